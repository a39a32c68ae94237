"""The model of a run: where it comes from, and how it is exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.codecs import PACKED
from jaxmoe.config import ModelConfig
from jaxmoe.interop.adapting import Adapted
from jaxmoe.interop.decomposing import Decomposed
from jaxmoe.interop.export_plan import exported_shards, refuse_overlap
from jaxmoe.interop.peft.merged import write_merged
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.quantizing import RECORD, Recorded, Replay
from jaxmoe.interop.saving import write_folder
from jaxmoe.interop.source import Source, config_source, open_source
from jaxmoe.interop.storage.writer import FolderWriter
from jaxmoe.model.linear import LowRank, dense
from jaxmoe.parallel import processes
from jaxmoe.params import Tree, count

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""A and B of adapted parameters, by our names."""


def open_model(config: ModelConfig) -> Source:
    """Open the model that a run names, without loading its weights.

    Raises:
        UserError: the folder, its files or its config are missing, malformed or not supported.
    """
    return open_source(config.path) if config.path is not None else config_source(config.config or {})


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
    adapted: Adapted,
    trained: Tree,
    folder: Path,
    *,
    base: str | None,
    dtype: Any,
    first: Factors | None = None,
    overwrite: bool = False,
) -> None:
    """Write what was trained as a PEFT adapter. Every process calls it, the first one writes.

    Args:
        adapted: what has low-rank pairs.
        trained: their factors, and what is trained beside them; None for the rest.
        folder: a new folder, or with `overwrite` one that holds an adapter.
        base: path or hub id of the model, for the adapter's config.
        dtype: that the run computes in.
        first: see `Adapted.adapter`.

    Raises:
        UserError: the folder is not empty, holds the model or the adapter that the run began with, or cannot be
            written.
    """
    adapter = adapted.adapter(_on_host(trained), base, first)
    recorded = _recorded(adapted, dtype)
    extra = {} if recorded is None else {RECORD: (recorded.model_dump_json(indent=2) + "\n").encode()}

    def write() -> None:
        for origin in (adapted.source.folder, adapted.given_from):
            if origin is not None:
                refuse_overlap(origin, folder)
        write_adapter(adapter, adapted.model.anatomy, folder, overwrite=overwrite, extra_files=extra)

    processes.first(write)


def _recorded(adapted: Adapted, dtype: Any) -> Recorded | None:
    """How the base was quantised, if it was: what is kept as it is needs no record."""
    forms = {name: form for name, form in adapted.forms.items() if not form.kept}
    return Recorded.of(forms, adapted.model, dtype, adapted.init) if forms else None


def export_merged(
    adapted: Adapted,
    trained: Tree,
    weights: Tree,
    folder: Path,
    *,
    dtype: Any,
    tokenizer_files: Mapping[str, Path | None],
    lessened: Decomposed | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the model with the adapter merged in, as `jaxmoe.interop.peft.merged` does it; returns what was left out.

    A base that was held in few bits is what it was in training.

    Args:
        adapted, trained, overwrite: as in `export_adapter`.
        weights: all of them, for a model that has no folder.
        folder: a new folder, or with `overwrite` a checkpoint folder that is replaced.
        dtype, tokenizer_files: as in `export_model`.
        lessened: the weights, whose base is without the pairs that training began with.

    Raises:
        UserError: the folder is not empty or cannot be written, or a value does not fit the tensor's dtype.
    """
    if adapted.source.folder is None:
        whole = jax.tree.map(_multiplied_out, weights, is_leaf=_is_made_of_several)
        return export_model(
            adapted.source,
            whole,
            folder,
            dtype=dtype,
            tokenizer_files=tokenizer_files,
            overwrite=overwrite,
        )
    # What is quantised is made again, without those pairs; of the rest the adapter takes them off.
    recorded, changed = _recorded(adapted, dtype), None if lessened is None else lessened.left
    first = {} if lessened is None else lessened.factors
    first = {name: factors for name, factors in first.items() if name not in adapted.forms}
    adapter = adapted.adapter(_on_host(trained), None, first)

    def write() -> list[str]:
        return write_merged(
            adapted.source,
            adapted.model,
            adapter,
            folder,
            overwrite=overwrite,
            replaced_files=tokenizer_files,
            replay=None if recorded is None else Replay(adapted.source, adapted.model, recorded, changed),
        )[1]

    return processes.first(write)


def _is_made_of_several(leaf: Any) -> bool:
    return isinstance(leaf, (LowRank, *PACKED))


@jax.jit
def _multiplied_out(weight: Any) -> jax.Array:
    return dense(weight, jnp.float32) if _is_made_of_several(weight) else weight


def _on_host(tree: Tree) -> Tree:
    """Whole arrays in this process's memory. Every process calls it."""

    def fetch(array: Any) -> np.ndarray:
        if not array.is_fully_addressable:
            whole = NamedSharding(array.sharding.mesh, PartitionSpec())
            array = jax.jit(lambda x: x, out_shardings=whole)(array)
        return np.asarray(array)

    return jax.tree.map(fetch, tree)


def _stored_bytes(source: Source, dtype: Any, quantization: str) -> int:
    if source.folder is not None:
        return sum(shard.file_bytes for shard in exported_shards(source, quantization))
    return count(source.spec.declared) * jnp.dtype(dtype).itemsize
