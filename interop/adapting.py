"""Adapters in a model's trees: which of our parameters carry a low-rank pair, and pairs by transformers' names in them.

PEFT adapts parameters of transformers' model. Each of them is a part of one of ours: of one layer of a stack, and
sometimes of one of several matrices that we hold together, as gate and up of a dense feed-forward. An adapted parameter
becomes a `jaxmoe.model.linear.LowRank` of declarations, of masks or of arrays, wherever its plain form was. Where only
some matrices of a parameter are adapted, the others have pairs of zeros, which every gradient leaves as they are.
"""

import dataclasses
import functools
import json
import math
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import AdapterConfig, QuantizationConfig
from jaxmoe.errors import listed
from jaxmoe.interop.adaptable import (
    check_base,
    unadaptable,
    undivided,
    undroppable,
    uneven,
    unquantised,
    without_lengths,
)
from jaxmoe.interop.keeping import kept_forms, layer_schemes
from jaxmoe.interop.peft.adapter import Adapter
from jaxmoe.interop.peft.adapter import LowRank as Pair
from jaxmoe.interop.peft.config import parse_adapter_config, read_adapter_config
from jaxmoe.interop.peft.matching import match
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.today import Today, today
from jaxmoe.interop.peft.writing import describe_adapter
from jaxmoe.interop.places import Place, Width, declared_lengths, declared_pair, draw
from jaxmoe.interop.quantizing import Form, forms_of
from jaxmoe.interop.selection import regrouped
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.problems import raise_problems
from jaxmoe.model.linear import LowRank
from jaxmoe.params import Param, Tree, named

_WHERE = "adapter"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model and what of it is trained: low-rank pairs, and parameters as a whole beside them.

    Attributes:
        source: the model, its layers grouped so that those of a group are adapted alike.
        model: as transformers has it; its bindings are on the groups of `source`.
        widths: of the pairs, by the name of the adapted parameter in transformers' model.
        saved: names of the parameters that are trained as a whole.
        given: the adapter that training begins with, or None for a new one.
        given_from: the folder of `given`.
        init: how the factors of a new one begin, see `jaxmoe.config.AdapterConfig`.
        dropout: share of the inputs of A that training sets to zero.
        dora: rows have lengths that are trained beside the pairs.
        forms: of the frozen parameters that are held in few bits, by our names.
    """

    source: Source
    model: Today
    widths: Mapping[str, Width]
    saved: frozenset[str]
    given: Adapter | None
    init: str
    dropout: float = 0.0
    dora: bool = False
    given_from: Path | None = None
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def declared(self) -> Tree:
        """`ModelSpec.declared` with a `LowRank` in the place of every adapted parameter, and packed bases."""

        def base(name: str, declared: Param) -> Any:
            return self.forms[name].packed if name in self.forms else declared

        return self._with_pairs(
            lambda name, declared, places: dataclasses.replace(
                declared_pair(declared, places),
                base=base(name, declared),
                magnitude=declared_lengths(declared) if self.dora else None,
            ),
            base,
        )

    @property
    def mask(self) -> Tree:
        """What is trained, a tree like `declared`."""
        saved = {self.model.bindings[name].target for name in self.saved}

        def base(name: str, trained: bool) -> Any:
            return jax.tree.map(lambda _: False, self.forms[name].packed) if name in self.forms else trained

        return self._with_pairs(
            lambda name, _, places: LowRank(
                base(name, False), True, True, places[0].width.scale, magnitude=True if self.dora else None
            ),
            lambda name, _: base(name, name in saved),
        )

    def rates(self, ratio: float) -> Tree | None:
        """Factors on the learning rate, a tree like `declared`; None where all are 1.

        It is `ratio` for every B and magnitude, as in peft's ``create_loraplus_optimizer``, which leaves out those of
        embeddings as well.
        """
        if ratio == 1.0:
            return None
        lengths = ratio if self.dora else None

        def raised(path: Any, one: Any) -> Any:
            if not _is_pair(one) or _name(path) == "embed":
                return one
            return dataclasses.replace(one, b=ratio, magnitude=lengths)

        ones = jax.tree.map(lambda _: 1.0, self.declared)
        return jax.tree_util.tree_map_with_path(raised, ones, is_leaf=_is_pair)

    def _with_pairs(self, pair: Any, other: Any) -> Tree:
        """`pair` of (name, declaration, places) for each adapted parameter; of the others `other` of both first."""
        spec = self.source.spec
        leaves = []
        for name, declared in named(spec.declared):
            places = self.places.get(name)
            if places:
                leaves.append(pair(name, declared, places))
            else:
                leaves.append(other(name, declared))
        return jax.tree.unflatten(jax.tree.structure(spec.declared), leaves)

    @functools.cached_property
    def places(self) -> dict[str, list[Place]]:
        """Of each of our parameters that are adapted, where the factors of its parts lie."""
        found: dict[str, list[Place]] = {}
        for name, width in self.widths.items():
            place = Place(name, self.model.bindings[name], width)
            found.setdefault(place.binding.target, []).append(place)
        return found

    def new_factors(self, key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """A and B of every adapted parameter as a new adapter has them (`AdapterConfig.init`), float32, by our names.

        Every parameter of transformers' model draws from its own fold of the key.
        """
        order = {name: number for number, name in enumerate(self.widths)}
        factors = {}
        for target, places in self.places.items():
            declared = declared_pair(places[0].binding.declared, places)
            a, b = (jnp.zeros(factor.shape, jnp.float32) for factor in (declared.a, declared.b))
            for place in places:
                own = draw(self.init, jax.random.fold_in(key, order[place.name]), place)
                a, b = place.put((a, b), own)
            factors[target] = (a, b)
        return factors

    def given_factors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same, of `given`."""
        assert self.given is not None
        factors = {}
        for target, places in self.places.items():
            declared = declared_pair(places[0].binding.declared, places)
            a, b = (np.zeros(factor.shape, np.float32) for factor in (declared.a, declared.b))
            for place in places:
                pair = self.given.pairs[place.name]
                of_tensor = (
                    (pair.b.swapaxes(-1, -2), pair.a.swapaxes(-1, -2)) if place.swapped else (pair.a, pair.b)
                )
                a, b = place.put((a, b), of_tensor)
            factors[target] = (a, b)
        return factors

    def given_magnitudes(self) -> dict[str, np.ndarray]:
        """Those of `given`, by our names."""
        assert self.given is not None
        magnitudes = {}
        for target, places in self.places.items():
            whole = np.zeros(declared_lengths(places[0].binding.declared).shape, np.float32)
            for place in places:
                lengths = self.given.pairs[place.name].magnitude
                assert lengths is not None
                place.put_lengths(whole, lengths)
            magnitudes[target] = whole
        return magnitudes

    def begun(self, weights: Tree) -> Tree:
        """Weights of the model, a tree like `ModelSpec.declared`, with those that a given adapter replaces.

        Nothing is done about a None.
        """
        by_name = dict(named(weights))
        for name, value in ({} if self.given is None else self.given.saved).items():
            binding = self.model.bindings[name]
            before = by_name.get(binding.target)
            if before is not None:
                part = jnp.asarray(binding.to_parameter(value.reshape(binding.sizes)), before.dtype)
                after = before.at[binding.place].set(part)
                by_name[binding.target] = jax.device_put(after, before.sharding)
        return jax.tree.unflatten(jax.tree.structure(weights), list(by_name.values()))

    def joined(self, weights: Tree, factors: Mapping[str, tuple[Any, Any]]) -> Tree:
        """Weights like `ModelSpec.declared` with A and B by our names: a tree like `declared`."""
        structure: Any = jax.tree.structure(self.source.spec.declared)
        leaves = []
        for (name, _), weight in zip(
            named(self.source.spec.declared), structure.flatten_up_to(weights), strict=True
        ):
            places = self.places.get(name)
            leaves.append(LowRank(weight, *factors[name], places[0].width.scale) if places else weight)
        return jax.tree.unflatten(structure, leaves)

    def adapter(
        self,
        trained: Tree,
        base: str | None,
        first: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> Adapter:
        """What was trained, by transformers' names, float32.

        Args:
            trained: host arrays in the tree of `declared`; None for what is frozen.
            base: path or hub id of the model, for the adapter's folder.
            first: factors by our names that the base is without: their pairs then are twice as wide, and take them off
                the unchanged weights.
        """
        pairs: dict[str, Pair] = {}
        weights = jax.tree_util.tree_leaves_with_path(trained, is_leaf=lambda x: isinstance(x, LowRank))
        by_name = {_name(path): leaf for path, leaf in weights}
        for target, places in self.places.items():
            for place in places:
                a, b = place.take((by_name[target].a, by_name[target].b))
                if first is not None and target in first:
                    first_a, first_b = place.take(first[target])
                    a, b = np.concatenate([a, first_a], axis=-2), np.concatenate([b, -first_b], axis=-1)
                a, b = (b.swapaxes(-1, -2), a.swapaxes(-1, -2)) if place.swapped else (a, b)
                pairs[place.name] = Pair(
                    place.name,
                    a,
                    b,
                    place.width.scale,
                    place.take_lengths(by_name[target].magnitude) if self.dora else None,
                    transposed=place.swapped or place.inputs_first,
                    wrapped=place.wrapped(self.model),
                )
        saved = {} if self.given is None else {**self.given.saved}
        saved |= {
            name: self.model.bindings[name].to_tensor(by_name[binding.target][binding.place])
            for name, binding in ((name, self.model.bindings[name]) for name in sorted(self.saved))
        }
        ordered = {name: pairs[name] for name in self.widths}
        return Adapter(ordered, saved, base, self.dropout)

    def told(self) -> str:
        """What is adapted, in one line: kinds of parameters, how many of each, and rank."""
        kinds = Counter(
            (".".join(part for part in name.removesuffix(".weight").split(".")[3:] if part), width.rank)
            if ".layers." in name
            else (name.removesuffix(".weight"), width.rank)
            for name, width in self.widths.items()
        )
        ranks = {rank for _, rank in kinds}
        rank = f" of rank {ranks.pop()}" if len(ranks) == 1 else ""
        parts = [
            f"{number} x {kind}" + ("" if rank else f" (rank {r})") for (kind, r), number in kinds.items()
        ]
        whole = f"; as a whole {listed(sorted(self.saved), 4)}" if self.saved else ""
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind}{rank} on {listed(parts, 12)}{whole}: {self.trained:,} parameters train"

    @property
    def fingerprint(self) -> int:
        """Of what a checkpoint's factors mean: names, ranks, scales, dropout and what is trained as a whole."""
        meant = [sorted(self.widths.items()), sorted(self.saved), self.dropout, self.dora]
        return zlib.crc32(json.dumps(meant).encode())

    @property
    def decomposes(self) -> bool:
        """Whether new factors begin as a part of the weights."""
        return self.given is None and self.init in ("pissa", "olora", "loftq")

    @property
    def trained(self) -> int:
        """Numbers that training changes: zeros of what is not adapted within a parameter do not count."""
        total = 0
        for places in self.places.values():
            for place in places:
                total += math.prod(place.shapes[0]) + math.prod(place.shapes[1])
                total += place.shapes[1][-2] if self.dora else 0
        return total + sum(math.prod(self.model.bindings[name].shape) for name in self.saved)


def adapt(source: Source, config: AdapterConfig, quantization: QuantizationConfig | None = None) -> Adapted:
    """What an adapter's config, or the adapter that it names, adapts of a model.

    Raises:
        UserError: patterns that match nothing or what cannot be adapted, an adapter that does not fit the model, or
            parts of one parameter that would have different ranks.
    """
    model = today(source)
    given = None if config.path is None else read_adapter(config.path, model.anatomy)
    if given is not None:
        widths = {name: Width(pair.rank, pair.scale) for name, pair in given.pairs.items()}
        # With an adapted embedding or head PEFT stores its weights too, which are not trained.
        endings = read_adapter_config(Path(config.path or "")).modules_to_save or ()
        of_module = {name: name.rpartition(".")[0] for name in given.saved.keys() - given.pairs.keys()}
        saved = frozenset(name for name, module in of_module.items() if any(map(module.endswith, endings)))
        # What PEFT could not say at the end is found now.
        describe_adapter(given, model.anatomy, f"adapter.path: {config.path}")
        check_base(Path(config.path or ""), quantization)
        dora = any(pair.magnitude is not None for pair in given.pairs.values())
    else:
        matched = match(parse_adapter_config(_as_peft(config), _WHERE), model.anatomy, _WHERE)
        widths = {name: Width(target.rank, target.scale) for name, target in matched.targets.items()}
        saved = frozenset(matched.saved)
        dora = config.dora
    where = _WHERE if config.path is None else f"adapter.path: {config.path}"
    dropout = config.dropout
    if dropout is None:
        dropout = 0.0 if given is None else given.dropout
    problems = [*unadaptable(source, model, widths, saved, config.init), *undroppable(model, widths, dropout)]
    raise_problems(where, [*problems, *(without_lengths(model, widths) if dora else ())])
    keeps = quantization is not None and quantization.kind == "keep"
    schemes = layer_schemes(source, model) if keeps else {}
    layered = regrouped(source, _signatures(source, model, widths, saved, schemes))
    if layered is not source:
        model = today(layered)
    given_from = None if config.path is None else Path(config.path)
    adapted = Adapted(layered, model, widths, saved, given, config.init, dropout, dora, given_from)
    raise_problems(where, list(uneven(adapted)))
    if quantization is not None:
        whole = {model.bindings[name].target for name in saved}
        declared = layered.spec.declared
        forms = kept_forms(layered, model) if keeps else forms_of(declared, model, quantization)
        adapted = dataclasses.replace(
            adapted, forms={name: form for name, form in forms.items() if name not in whole}
        )
    if config.init == "loftq":
        raise_problems(where, list(unquantised(adapted)))
    if adapted.decomposes:
        raise_problems(where, list(undivided(adapted)))
    return adapted


def _as_peft(config: AdapterConfig) -> dict[str, Any]:
    """The same config in PEFT's words."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters or None,
        "exclude_modules": config.exclude_modules,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save or None,
    }


def _signatures(
    source: Source,
    model: Today,
    widths: Mapping[str, Width],
    saved: frozenset[str],
    schemes: Mapping[str, Mapping[int, Hashable]],
) -> Sequence[Hashable]:
    """Of every layer, what of it is adapted, and how; and by `schemes` how its parameters are kept."""
    found: dict[tuple[int, int, int], set[Hashable]] = {}
    for target, of_layer in schemes.items():
        _, group, place, rest = target.split(".", 3)
        for layer, scheme in of_layer.items():
            found.setdefault((int(group), int(place), layer), set()).add((rest, scheme))
    for name in [*widths, *saved]:
        binding = model.bindings[name]
        if binding.target.startswith("groups."):
            _, group, place, rest = binding.target.split(".", 3)
            others = tuple(sorted((letter, i) for letter, i in binding.index.items() if letter != "L"))
            key = int(group), int(place), binding.index["L"]
            found.setdefault(key, set()).add((rest, others, widths.get(name)))
    spec = source.spec
    return [frozenset(found.get(spec.locate(layer), ())) for layer in range(len(spec.layers))]


def base_of(tree: Tree) -> Tree:
    """A tree of `Adapted.declared` without its factors: one of `ModelSpec.declared`."""
    return jax.tree.map(
        lambda leaf: leaf.base if _is_pair(leaf) else leaf, tree, is_leaf=lambda x: x is None or _is_pair(x)
    )


def named_pairs(tree: Tree) -> list[tuple[str, LowRank]]:
    """The low-rank pairs of a tree, by the name of their parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_pair)
    return [(_name(path), leaf) for path, leaf in leaves if _is_pair(leaf)]


def with_magnitudes(tree: Tree, magnitudes: Mapping[str, Any]) -> Tree:
    """A tree of weights whose pairs have these, by the name of their parameter."""

    def with_own(path: Any, leaf: Any) -> Any:
        name = _name(path)
        return dataclasses.replace(leaf, magnitude=magnitudes[name]) if _is_pair(leaf) else leaf

    return jax.tree_util.tree_map_with_path(with_own, tree, is_leaf=_is_pair)


def _is_pair(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
