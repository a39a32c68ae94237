"""The model of a run: where its weights come from, and how they are exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.config import ModelConfig
from jaxmoe.interop.adapting import Adapted, base_of, named_pairs
from jaxmoe.interop.export_plan import exported_shards
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.peft.merged import write_merged
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.quantizing import Form, load_packed
from jaxmoe.interop.saving import write_folder
from jaxmoe.interop.source import Source, config_source, open_source
from jaxmoe.interop.storage.writer import FolderWriter
from jaxmoe.model.linear import PACKED, LowRank, dense
from jaxmoe.parallel import processes
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Param, Tree, count, draw_param, initializer, named


def open_model(config: ModelConfig) -> Source:
    """Open the model that a run names, without loading its weights.

    Raises:
        UserError: the folder, its files or its config are missing, malformed or not supported.
    """
    return open_source(config.path) if config.path is not None else config_source(config.config or {})


class InitialWeights:
    """The weights that a run begins with, sharded: read from the checkpoint, or drawn at random.

    Args:
        source: the model.
        dtypes: of each parameter; None for those that are not wanted.
        mesh: that shards them.
        seed: of random ones, and of the factors of a new adapter.
        adapted: what has low-rank pairs, which `dtypes` then has as well.
    """

    def __init__(
        self, source: Source, dtypes: Tree, mesh: Mesh, seed: int, adapted: Adapted | None = None
    ) -> None:
        self._source, self._dtypes, self._mesh, self._seed = source, dtypes, mesh, seed
        self._adapted = adapted
        base = base_of(dtypes)
        is_packed = lambda leaf: isinstance(leaf, PACKED)
        self._plain = jax.tree.map(lambda leaf: None if is_packed(leaf) else leaf, base, is_leaf=is_packed)
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
        structure = jax.tree.structure(adapted.source.spec.declared)
        names = [name for name, _ in named(adapted.source.spec.declared)]
        leaves = dict(zip(names, structure.flatten_up_to(base), strict=True))
        return {name: form for name, form in adapted.forms.items() if jax.tree.leaves(leaves[name])}

    def _with_packed(self, adapted: Adapted, weights: Tree) -> Tree:
        """Weights with those that are held in few bits, read and quantised or drawn and quantised."""
        if not self._packed:
            return weights
        declared = adapted.source.spec.declared
        structure = jax.tree.structure(declared)
        placements = structure.flatten_up_to(base_of(shardings(adapted.declared, self._mesh)))
        leaves = structure.flatten_up_to(weights)
        for index, (name, parameter) in enumerate(named(declared)):
            form, where = self._packed.get(name), placements[index]
            if form is None:
                continue
            if self._source.folder is not None:
                _, files = self._source.opened
                parts = self._source.bindings.of_parameter[name]
                leaves[index] = load_packed(files, form, parts, where)
            else:
                leaves[index] = self._drawn(form, parameter, index, where)
        return jax.tree.unflatten(structure, leaves)

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
        if any(pair.a is None for pair in wanted):
            factors = [(None, None)] * len(wanted)
        elif adapted.given is not None:
            given = adapted.given_factors()
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
        return adapted.joined(weights, pairs)


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def export_model(
    source: Source,
    weights: Tree,
    folder: Path,
    *,
    dtype: Any,
    tokenizer_files: Mapping[str, Path | None],
    overwrite: bool = False,
    quantization: str = "none",
) -> list[str]:
    """Write a Hugging Face folder; returns the source's files that were left out.

    Every process calls it, the first one writes. When it returns the folder is there for all of them.

    Args:
        source: where the model comes from.
        weights: all of them.
        folder: a new folder, or with `overwrite` a checkpoint folder that is replaced.
        dtype: of the export of a model that has no folder.
        tokenizer_files: of a tokenizer that does not come with the model, by name; None where it has no such file.
        overwrite: see `folder`.
        quantization: "none": what the source has quantised is written in bfloat16; "source": as it has it.

    Raises:
        UserError: the folder is not empty or holds something else, the disk is full, or a value does not fit the
            tensor's dtype.
    """

    def check_target() -> None:
        """Refuse before the processes begin to exchange weights, in which one that fails leaves the others."""
        FolderWriter(folder, overwrite=overwrite).check_room(_stored_bytes(source, dtype, quantization))

    processes.first(check_target)
    return processes.agree(
        lambda: write_folder(
            weights,
            source,
            folder,
            dtype=dtype,
            replaced_files=tokenizer_files,
            overwrite=overwrite,
            quantization=quantization,
        )
    )


def export_adapter(
    adapted: Adapted, trained: Tree, folder: Path, *, base: str | None, overwrite: bool = False
) -> None:
    """Write what was trained as a PEFT adapter. Every process calls it, the first one writes.

    Args:
        adapted: what has low-rank pairs.
        trained: their factors, and what is trained beside them; None for the rest.
        folder: a new folder, or with `overwrite` one that holds an adapter.
        base: path or hub id of the model, for the adapter's config.

    Raises:
        UserError: the folder is not empty or cannot be written, or values are not finite.
    """
    adapter = adapted.adapter(_on_host(trained), base)
    processes.first(lambda: write_adapter(adapter, adapted.model.anatomy, folder, overwrite=overwrite))


def export_merged(
    adapted: Adapted,
    trained: Tree,
    weights: Tree,
    folder: Path,
    *,
    dtype: Any,
    tokenizer_files: Mapping[str, Path | None],
    overwrite: bool = False,
) -> list[str]:
    """Write the model with the adapter merged in, as `jaxmoe.interop.peft.merged` does it; returns what was left out.

    Args:
        adapted, trained, overwrite: as in `export_adapter`.
        weights: all of them, for a model that has no folder.
        folder: a new folder, or with `overwrite` a checkpoint folder that is replaced.
        dtype, tokenizer_files: as in `export_model`.

    Raises:
        UserError: the folder is not empty or cannot be written, or a value does not fit the tensor's dtype.
    """
    if adapted.source.folder is None:
        whole = jax.tree.map(_multiplied_out, weights, is_leaf=lambda leaf: isinstance(leaf, LowRank))
        return export_model(
            adapted.source,
            whole,
            folder,
            dtype=dtype,
            tokenizer_files=tokenizer_files,
            overwrite=overwrite,
        )
    adapter = adapted.adapter(_on_host(trained), None)
    return processes.first(
        lambda: write_merged(
            adapted.source,
            adapted.model,
            adapter,
            folder,
            overwrite=overwrite,
            replaced_files=tokenizer_files,
        )[1]
    )


@jax.jit
def _multiplied_out(weight: Any) -> jax.Array:
    return dense(weight, jnp.float32) if isinstance(weight, LowRank) else weight


def _on_host(tree: Tree) -> Tree:
    """Whole arrays in this process's memory. Every process calls it."""

    def fetch(array: jax.Array) -> np.ndarray:
        if not array.is_fully_addressable:
            whole = NamedSharding(array.sharding.mesh, PartitionSpec())
            array = jax.jit(lambda x: x, out_shardings=whole)(array)
        return np.asarray(array)

    return jax.tree.map(fetch, tree)


def _stored_bytes(source: Source, dtype: Any, quantization: str) -> int:
    if source.folder is not None:
        return sum(shard.file_bytes for shard in exported_shards(source, quantization))
    return count(source.spec.declared) * jnp.dtype(dtype).itemsize
