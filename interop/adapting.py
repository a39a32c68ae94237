"""Adapters in a model's trees: which of our parameters carry a low-rank pair, and pairs by transformers' names in them.

PEFT adapts parameters of transformers' model. Each of them is a part of one of ours: of one layer of a stack, and
sometimes of one of several matrices that we hold together, as gate and up of a dense feed-forward. An adapted parameter
becomes a `jaxmoe.model.linear.LowRank` of declarations, of masks or of arrays, wherever its plain form was. Where only
some matrices of a parameter are adapted, the others have pairs of zeros, which every gradient leaves as they are.
"""

import dataclasses
import functools
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import AdapterConfig, QuantizationConfig
from jaxmoe.errors import UserError, listed
from jaxmoe.interop.peft.adapter import Adapter
from jaxmoe.interop.peft.adapter import LowRank as Pair
from jaxmoe.interop.peft.config import parse_adapter_config, read_adapter_config
from jaxmoe.interop.peft.matching import match
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.today import Today, today
from jaxmoe.interop.peft.writing import describe_adapter
from jaxmoe.interop.quantizing import Form, Recorded, forms_of
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.selection import regrouped
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.problems import raise_problems
from jaxmoe.model.linear import LowRank
from jaxmoe.params import Param, Tree, named

_log = logging.getLogger(__name__)

_WHERE = "adapter"


class Width(NamedTuple):
    """Rank and scale of a pair."""

    rank: int
    scale: float


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
        forms: of the frozen parameters that are held in few bits, by our names.
    """

    source: Source
    model: Today
    widths: Mapping[str, Width]
    saved: frozenset[str]
    given: Adapter | None
    init: str
    dropout: float = 0.0
    given_from: Path | None = None
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def declared(self) -> Tree:
        """`ModelSpec.declared` with a `LowRank` in the place of every adapted parameter, and packed bases."""

        def base(name: str, declared: Param) -> Any:
            return self.forms[name].packed if name in self.forms else declared

        return self._with_pairs(
            lambda name, declared, places: dataclasses.replace(
                declared_pair(declared, places), base=base(name, declared)
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
            lambda name, _, places: LowRank(base(name, False), True, True, places[0].width.scale),
            lambda name, _: base(name, name in saved),
        )

    def rates(self, ratio: float) -> Tree | None:
        """Factors on the learning rate, a tree like `declared`: `ratio` for every B; None where all are 1."""
        if ratio == 1.0:
            return None
        ones = jax.tree.map(lambda _: 1.0, self.declared)
        raised = lambda one: dataclasses.replace(one, b=ratio) if _is_pair(one) else one
        return jax.tree.map(raised, ones, is_leaf=_is_pair)

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
    def places(self) -> dict[str, list["Place"]]:
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
                own = _draw(self.init, jax.random.fold_in(key, order[place.name]), place)
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
            first: factors by our names that the base is without: each pair then is twice as wide, and takes them off
                the unchanged weights.
        """
        pairs: dict[str, Pair] = {}
        weights = jax.tree_util.tree_leaves_with_path(trained, is_leaf=lambda x: isinstance(x, LowRank))
        by_name = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in weights}
        for target, places in self.places.items():
            for place in places:
                a, b = place.take((by_name[target].a, by_name[target].b))
                if first is not None:
                    first_a, first_b = place.take(first[target])
                    a, b = np.concatenate([a, first_a], axis=-2), np.concatenate([b, -first_b], axis=-1)
                a, b = (b.swapaxes(-1, -2), a.swapaxes(-1, -2)) if place.swapped else (a, b)
                pairs[place.name] = Pair(
                    place.name,
                    a,
                    b,
                    place.width.scale,
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
        return f"LoRA{rank} on {listed(parts, 12)}{whole}: {self.trained:,} parameters train"

    @property
    def fingerprint(self) -> int:
        """Of what a checkpoint's factors mean: names, ranks, scales, dropout and what is trained as a whole."""
        meant = [sorted(self.widths.items()), sorted(self.saved), self.dropout]
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
        return total + sum(math.prod(self.model.bindings[name].shape) for name in self.saved)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the factors of one parameter of transformers' model lie in those of ours.

    Attributes:
        name: in transformers' model.
        binding: of it.
        width: of its pair.
    """

    name: str
    binding: Binding
    width: Width

    @property
    def swapped(self) -> bool:
        """PEFT's A of an embedding is (r, tokens) and its B (width, r): ours are b transposed and a transposed."""
        return self.binding.target == "embed"

    @property
    def inputs_first(self) -> bool:
        """The tensor is (…, in, out)."""
        return self.binding.axes[-1] != (self.binding.declared.dims[-1],)

    def wrapped(self, model: Today) -> bool:
        """PEFT adds it to a bare parameter or an embedding."""
        kind = model.anatomy.by_name[self.name.rpartition(".")[0]].kind
        return self.swapped or kind in ("other", "router")

    @property
    def _outputs(self) -> tuple[str, ...]:
        first, second = self.binding.axes[-2:]
        return second if self.inputs_first else first

    @property
    def _batch(self) -> tuple[str, ...]:
        return tuple(letter for group in self.binding.axes[:-2] for letter in group)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(…, r, in) of A and (…, out, r) of B as they are for the tensor, before PEFT swaps those of an embedding."""
        sizes = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        batch = tuple(sizes[letter] for letter in self._batch)
        outputs = math.prod(sizes[letter] for letter in self._outputs)
        return (
            (*batch, self.width.rank, sizes[self.binding.declared.dims[-1]]),
            (*batch, outputs, self.width.rank),
        )

    def put(self, whole: Any, factors: Any) -> Any:
        """A and B of the whole parameter with the tensor's in their place; numpy's are changed where they are."""
        (a_at, b_at), (a, b) = self._indices(), factors
        sizes = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        a = a.reshape(whole[0][a_at].shape)
        free = [letter for letter in self.binding.declared.dims[:-1] if letter not in self.binding.index]
        b = einops.rearrange(b, f"{self._spelled} -> {' '.join([*free, 'r'])}", **self._known(sizes))
        if isinstance(whole[0], np.ndarray):
            whole[0][a_at], whole[1][b_at] = a, b
            return whole
        return whole[0].at[a_at].set(a), whole[1].at[b_at].set(b)

    def take(self, whole: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The tensor's A and B out of those of the whole parameter."""
        a_at, b_at = self._indices()
        free = [letter for letter in self.binding.declared.dims[:-1] if letter not in self.binding.index]
        b = einops.rearrange(whole[1][b_at], f"{' '.join([*free, 'r'])} -> {self._spelled}")
        return whole[0][a_at].reshape(self.shapes[0]), np.ascontiguousarray(b)

    @property
    def _spelled(self) -> str:
        return " ".join([*self._batch, f"({' '.join(self._outputs)})", "r"])

    def _known(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in self._outputs}

    def _indices(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Of the parts in A and in B."""
        leading = self.binding.declared.dims[:-1]
        at = tuple(self.binding.index.get(letter, slice(None)) for letter in leading)
        return at[:-1], at


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
        _check_base(Path(config.path or ""), quantization)
        lengths = [name for name, pair in given.pairs.items() if pair.magnitude is not None]
        if lengths:
            raise UserError(
                f"adapter.path: {config.path} has DoRA magnitudes, such as of {lengths[0]}: expected LoRA without "
                "DoRA; merge it (jaxmoe.merge) and train a new adapter"
            )
    else:
        matched = match(parse_adapter_config(_as_peft(config), _WHERE), model.anatomy, _WHERE)
        widths = {name: Width(target.rank, target.scale) for name, target in matched.targets.items()}
        saved = frozenset(matched.saved)
    where = _WHERE if config.path is None else f"adapter.path: {config.path}"
    dropout = config.dropout
    if dropout is None:
        dropout = 0.0 if given is None else given.dropout
    problems = [*_problems(source, model, widths, saved, config.init), *_undroppable(model, widths, dropout)]
    raise_problems(where, problems)
    layered = regrouped(source, _signatures(source, model, widths, saved))
    if layered is not source:
        model = today(layered)
    given_from = None if config.path is None else Path(config.path)
    adapted = Adapted(layered, model, widths, saved, given, config.init, dropout, given_from)
    raise_problems(where, list(_uneven(adapted)))
    if quantization is not None:
        whole = {model.bindings[name].target for name in saved}
        forms = forms_of(layered.spec.declared, model, quantization)
        adapted = dataclasses.replace(
            adapted, forms={name: form for name, form in forms.items() if name not in whole}
        )
    if config.init == "loftq":
        raise_problems(where, list(_unquantised(adapted)))
    return adapted


def _check_base(folder: Path, quantization: QuantizationConfig | None) -> None:
    """Whether training goes on on the base that an adapter was trained on.

    Raises:
        UserError: it carries what quantising lost, and the base would not lose it.
    """
    recorded = Recorded.find(folder)
    if recorded is None or recorded.quantization == quantization:
        return
    now = "not quantised" if quantization is None else f"quantised as {quantization.kind}"
    told = f"adapter.path: {folder} was trained on a base in {recorded.told}, and here it is {now}"
    if recorded.init == "loftq":
        raise UserError(
            f"{told}: expected the same, as its factors hold what that loses; set model.quantization"
        )
    _log.warning("%s", told)


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


def _problems(
    source: Source, model: Today, widths: Mapping[str, Width], saved: frozenset[str], init: str
) -> Iterator[str]:
    holders = {module.full(name): module for module, name in model.anatomy.parameters()}
    for name in [*widths, *saved]:
        if name not in model.bindings:
            yield f"{name} is not a part of the language model: expected a parameter of it"
        elif model.bindings[name].declared.role == "constant":
            yield f"{name} is a constant that no gradient changes: expected a parameter that can be trained"
        elif model.bindings[name].target == "embed" and source.spec.tie_embeddings:
            yield (
                f"{name} is the output head as well (tie_word_embeddings), and PEFT would adapt one of the two alone: "
                "expected target_modules and modules_to_save without it"
            )
    for name, width in widths.items():
        if name in saved:
            yield f"{name} is adapted and trained as a whole: expected one of them"
        if name in holders and init not in ("default", "gaussian"):
            module, parameter = holders[name], name.rpartition(".")[2]
            if module.kind != "linear":
                yield f"{name} is no linear layer: expected 'default' or 'gaussian' in place of adapter.init {init!r}"
            elif init == "orthogonal" and width.rank % 2:
                yield f"{name} has rank {width.rank}: expected an even one for adapter.init 'orthogonal'"
            elif init != "orthogonal" and width.rank > min(module.parameters[parameter]):
                yield (
                    f"{name} {list(module.parameters[parameter])} has rank {width.rank}: expected at most its smaller "
                    f"side for adapter.init {init!r}"
                )


def _undroppable(model: Today, widths: Mapping[str, Width], dropout: float) -> Iterator[str]:
    if dropout >= 1:
        yield f"lora_dropout {dropout:g} leaves nothing: expected less than 1; set adapter.dropout"
    for name in widths:
        if dropout and name in model.bindings and model.bindings[name].target == "lm_head":
            yield (
                f"{name} is adapted with dropout {dropout:g}, which the output head's fused loss does not have: "
                "expected adapter.dropout 0, or target_modules without it"
            )


def _signatures(
    source: Source, model: Today, widths: Mapping[str, Width], saved: frozenset[str]
) -> Sequence[Hashable]:
    """Of every layer, what of it is adapted, and how."""
    found: dict[tuple[int, int, int], set[Hashable]] = {}
    for name in [*widths, *saved]:
        binding = model.bindings[name]
        if binding.target.startswith("groups."):
            _, group, place, rest = binding.target.split(".", 3)
            others = tuple(sorted((letter, i) for letter, i in binding.index.items() if letter != "L"))
            key = int(group), int(place), binding.index["L"]
            found.setdefault(key, set()).add((rest, others, widths.get(name)))
    spec = source.spec
    return [frozenset(found.get(spec.locate(layer), ())) for layer in range(len(spec.layers))]


def _uneven(adapted: Adapted) -> Iterator[str]:
    """Parameters of ours whose parts would not be trained alike."""
    for places in adapted.places.values():
        if len({place.width for place in places}) > 1:
            told = ", ".join(
                f"{place.name} (rank {place.width.rank}, scale {place.width.scale:g})" for place in places
            )
            yield f"{told} are parts of one parameter here: expected one rank and alpha for them"
    of_target: dict[str, list[str]] = {}
    for name, binding in adapted.model.bindings.items():
        of_target.setdefault(binding.target, []).append(name)
    for name in sorted(adapted.saved):
        missing = [
            other for other in of_target[adapted.model.bindings[name].target] if other not in adapted.saved
        ]
        if missing:
            yield (
                f"{name} is trained and {missing[0]} is not, which is a part of the same parameter: expected both or "
                "neither"
            )


def _unquantised(adapted: Adapted) -> Iterator[str]:
    for target, places in adapted.places.items():
        if target not in adapted.forms:
            yield (
                f"{places[0].name} is not held in few bits, and adapter.init 'loftq' begins with what these lose: "
                "expected target_modules without it"
            )


def declared_pair(declared: Param, places: Sequence[Place]) -> LowRank:
    """The declarations of an adapted parameter and its factors."""
    place = places[0]
    rank = place.width.rank
    shared = [letter for letter in place._outputs if letter not in (declared.dims[-2], *place.binding.index)]
    sizes = [
        1 if letter in shared else size for letter, size in zip(declared.dims, declared.shape, strict=True)
    ]
    a = Param(
        declared.dims[:-2] + "r" + declared.dims[-1], (*sizes[:-2], rank, sizes[-1]), "zeros", declared.role
    )
    b = Param(declared.dims[:-1] + "r", (*declared.shape[:-1], rank), "zeros", declared.role)
    return LowRank(declared, a, b, place.width.scale)


def _draw(init: str, key: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
    """A (…, r, in) and B (…, out, r) of one parameter, as peft's ``reset_lora_parameters`` draws them."""
    a_shape, b_shape = place.shapes
    rank, inputs = a_shape[-2:]
    zeros = jnp.zeros(b_shape, jnp.float32)
    if place.swapped:  # PEFT's A of an embedding is zero, and its B normal
        return jax.random.normal(key, a_shape), zeros
    if init == "gaussian":
        return jax.random.normal(key, a_shape) / rank, zeros
    if init == "orthogonal":
        return _orthogonal(key, a_shape, b_shape)
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), zeros


def _orthogonal(
    key: jax.Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Rows of A and columns of B in complementary subspaces of R^r, so that B A = 0 and both have gradients.

    As peft's ``orthogonal_init``, after https://datta0.github.io/posts/rethink-lora-init.
    """
    rank = a_shape[-2]
    of_basis, of_a, of_b = jax.random.split(key, 3)
    basis, _ = jnp.linalg.qr(jax.random.normal(of_basis, (rank, rank)))
    odd, even = basis[0::2], basis[1::2]
    a = (jax.random.normal(of_a, (a_shape[-1], rank // 2)) @ odd).T / 10
    b = jax.random.normal(of_b, (b_shape[-2], rank // 2)) @ even / 10
    return a, b


def base_of(tree: Tree) -> Tree:
    """A tree of `Adapted.declared` without its factors: one of `ModelSpec.declared`."""
    return jax.tree.map(
        lambda leaf: leaf.base if _is_pair(leaf) else leaf, tree, is_leaf=lambda x: x is None or _is_pair(x)
    )


def named_pairs(tree: Tree) -> list[tuple[str, LowRank]]:
    """The low-rank pairs of a tree, by the name of their parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_pair)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in leaves
        if _is_pair(leaf)
    ]


def _is_pair(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)
