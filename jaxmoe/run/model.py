"""The model of a run: where its weights come from, and how they are exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.interop.export_plan import exported_shards
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.saving import write_folder
from jaxmoe.interop.source import Source, config_source, open_source
from jaxmoe.interop.storage.writer import FolderWriter
from jaxmoe.parallel import processes
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Tree, count, initializer


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
        seed: of random ones.
    """

    def __init__(self, source: Source, dtypes: Tree, mesh: Mesh, seed: int) -> None:
        self._source, self._dtypes, self._mesh, self._seed = source, dtypes, mesh, seed
        declared = source.spec.declared
        self._draw = initializer(declared, source.spec.init_std, dtypes, shardings(declared, mesh))

    def compile(self) -> None:
        """What draws them, which `make` then finds compiled."""
        if self._source.folder is None:
            self._draw.lower(jax.random.key(self._seed)).compile()

    def make(self) -> Tree:
        """Read or draw them."""
        if self._source.folder is not None:
            return load_params(self._source, self._dtypes, self._mesh)
        return self._draw(jax.random.key(self._seed))


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


def _stored_bytes(source: Source, dtype: Any, quantization: str) -> int:
    if source.folder is not None:
        return sum(shard.file_bytes for shard in exported_shards(source, quantization))
    return count(source.spec.declared) * jnp.dtype(dtype).itemsize
