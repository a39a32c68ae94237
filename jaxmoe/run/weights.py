"""The weights that a run begins with."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe.codecs import PACKED
from jaxmoe.interop.adapting import Adapted, base_of, named_pairs, with_magnitudes
from jaxmoe.interop.decomposing import Decomposed
from jaxmoe.interop.keeping import load_kept
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.quantizing import Form, load_packed, pack
from jaxmoe.interop.source import Source
from jaxmoe.model.linear import row_lengths
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Param, Tree, draw_param, initializer, named


class InitialWeights:
    """The weights that a run begins with, sharded: read from the checkpoint, or drawn at random.

    Args:
        source: the model.
        dtypes: of each parameter; None for those that are not wanted.
        mesh: that shards them.
        seed: of random ones, and of the factors of a new adapter.
        adapted: what has low-rank pairs, which `dtypes` then has as well.
        decomposed: the adapted weights where their pairs begin as a part of them.
    """

    def __init__(
        self,
        source: Source,
        dtypes: Tree,
        mesh: Mesh,
        seed: int,
        adapted: Adapted | None = None,
        decomposed: Decomposed | None = None,
    ) -> None:
        self._source, self._dtypes, self._mesh, self._seed = source, dtypes, mesh, seed
        self._adapted, self._decomposed = adapted, decomposed
        base = base_of(dtypes)
        apart = () if decomposed is None else decomposed.names
        structure: Any = jax.tree.structure(source.spec.declared)
        self._plain = jax.tree.unflatten(
            structure,
            [
                None if name in apart or isinstance(leaf, PACKED) else leaf
                for (name, _), leaf in zip(
                    named(source.spec.declared), structure.flatten_up_to(base), strict=True
                )
            ],
        )
        self._packed = {} if adapted is None else self._wanted_forms(adapted, base)
        declared = source.spec.declared
        self._draw = initializer(declared, source.spec.init_std, self._plain, shardings(declared, mesh))

    def compile(self) -> None:
        """What draws them, which `make` then finds compiled."""
        if self._source.folder is None:
            self._draw.lower(jax.random.key(self._seed)).compile()

    def make(self) -> Tree:
        """Read or draw them."""
        if self._source.folder is not None:
            weights = load_params(self._source, self._plain, self._mesh)
        else:
            weights = self._draw(jax.random.key(self._seed))
        if self._adapted is None:
            return weights
        weights = self._with_packed(self._adapted, self._adapted.begun(weights))
        return self._with_pairs(self._adapted, weights)

    @staticmethod
    def _wanted_forms(adapted: Adapted, base: Tree) -> dict[str, Form]:
        structure: Any = jax.tree.structure(adapted.source.spec.declared)
        names = [name for name, _ in named(adapted.source.spec.declared)]
        leaves = dict(zip(names, structure.flatten_up_to(base), strict=True))
        return {name: form for name, form in adapted.forms.items() if jax.tree.leaves(leaves[name])}

    def _with_packed(self, adapted: Adapted, weights: Tree) -> Tree:
        """Weights with those that are held in few bits, read and quantised or drawn and quantised."""
        apart = () if self._decomposed is None else self._decomposed.names
        if not self._packed and not apart:
            return weights
        declared = adapted.source.spec.declared
        structure: Any = jax.tree.structure(declared)
        placements = structure.flatten_up_to(base_of(shardings(adapted.declared, self._mesh)))
        leaves = structure.flatten_up_to(weights)
        dtypes = structure.flatten_up_to(base_of(self._dtypes))
        for index, (name, parameter) in enumerate(named(declared)):
            form, where = self._packed.get(name), placements[index]
            if name in apart:
                leaves[index] = self._left(name, form, dtypes[index], where)
            elif form is None:
                continue
            elif self._source.folder is not None:
                _, files = self._source.opened
                parts = self._source.bindings.of_parameter[name]
                load = load_kept if form.kept else load_packed
                leaves[index] = load(files, form, parts, where)
            else:
                leaves[index] = self._drawn(form, parameter, index, where)
        return jax.tree.unflatten(structure, leaves)

    def _left(self, name: str, form: Form | None, dtype: Any, where: Any) -> Any:
        """What a parameter's pair leaves of it as its base."""
        assert self._decomposed is not None
        base = self._decomposed.take(name).base
        if form is not None:
            return pack(form, lambda index: base[index], where)
        return _place(base.astype(dtype), where)

    def _drawn(self, form: Form, parameter: Param, index: int, where: Any) -> Any:
        """A packed parameter as `initializer` draws it."""

        def draw(key: jax.Array) -> Any:
            return form.quantize(
                draw_param(jax.random.fold_in(key, index), parameter, self._source.spec.init_std)
            )

        return jax.jit(draw, out_shardings=where)(jax.random.key(self._seed))

    def _with_pairs(self, adapted: Adapted, weights: Tree) -> Tree:
        """Weights with the factors of the adapter, as far as they are wanted."""
        wanted = [pair for _, pair in named_pairs(self._dtypes)]
        placed = [where for _, where in named_pairs(shardings(adapted.declared, self._mesh))]
        factors: list[Any]
        if any(pair.a is None for pair in wanted):
            factors = [(None, None)] * len(wanted)
        elif adapted.given is not None or self._decomposed is not None:
            begun = self._decomposed
            given = adapted.given_factors() if begun is None else begun.factors
            factors = [
                tuple(map(_place, given[name], (where.a, where.b)))
                for (name, _), where in zip(named_pairs(adapted.declared), placed, strict=True)
            ]
        else:
            # Another fold of the seed than any parameter's own.
            key = jax.random.fold_in(jax.random.key(self._seed), 2**31 - 1)
            drawn = jax.jit(
                adapted.new_factors,
                out_shardings={
                    name: (where.a, where.b)
                    for (name, _), where in zip(named_pairs(adapted.declared), placed, strict=True)
                },
            )(key)
            factors = [drawn[name] for name, _ in named_pairs(adapted.declared)]
        pairs = dict(zip((name for name, _ in named_pairs(adapted.declared)), factors, strict=True))
        joined = adapted.joined(weights, pairs)
        return joined if not adapted.dora or factors[0][0] is None else self._with_magnitudes(adapted, joined)

    def _with_magnitudes(self, adapted: Adapted, weights: Tree) -> Tree:
        """Pairs with the lengths of their rows, or with those of a given adapter."""
        given = None if adapted.given is None else adapted.given_magnitudes()
        of_name = dict(named_pairs(shardings(adapted.declared, self._mesh)))
        lengths = {}
        for name, pair in named_pairs(weights):
            where = of_name[name].magnitude
            if given is not None:
                lengths[name] = _place(given[name], where)
            else:
                lengths[name] = jax.jit(row_lengths, out_shardings=where)(pair)
        return with_magnitudes(weights, lengths)


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
