"""The model of a run: where its weights come from, and how they are exported."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.interop.loading import Source, compute_dtype, load_params, open_source
from jaxmoe.interop.pretrained import Blueprint, read_blueprint
from jaxmoe.interop.saving import export_like_source, export_new, exported_shards
from jaxmoe.interop.storage.writer import FolderWriter
from jaxmoe.model.spec import ModelSpec, model_params
from jaxmoe.parallel import processes
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Tree, count, initialize


@dataclasses.dataclass(frozen=True)
class RunModel:
    """A model that is known but not yet loaded.

    Attributes:
        origin: a checkpoint folder (`Source`), or a config alone (`Blueprint`).
        dtype: compute dtype, and that of the export of a model that has no source.
    """

    origin: Source | Blueprint
    dtype: Any

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.origin.spec

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder, which also holds the tokenizer."""
        return self.origin.folder if isinstance(self.origin, Source) else None

    def weights(self, mesh: Mesh, seed: int) -> Tree:
        """Float32 master weights, sharded: read from the checkpoint, or drawn at random from `seed`."""
        if isinstance(self.origin, Source):
            return load_params(self.origin, jnp.float32, mesh)
        tree = model_params(self.spec)
        return initialize(tree, jax.random.key(seed), self.spec.init_std, jnp.float32, shardings(tree, mesh))

    def export(
        self,
        weights: Tree,
        folder: Path,
        tokenizer_files: Mapping[str, Path | None],
        *,
        overwrite: bool = False,
        quantization: str = "none",
    ) -> list[str]:
        """Write a Hugging Face folder; returns the source's files that were left out.

        Every process calls it, the first one writes. When it returns the folder is there for all of them.

        Args:
            weights: as from `weights`.
            folder: a new folder, or with `overwrite` a checkpoint folder that is replaced.
            tokenizer_files: of a tokenizer that does not come with the model, by name; None where it has no
                such file.
            quantization: "none": what the source has quantised is written in bfloat16; "source": as it has it.

        Raises:
            UserError: the folder is not empty or holds something else, the disk is full, or a value does not fit
                the tensor's dtype.
        """
        processes.first(lambda: self._check_target(folder, overwrite, quantization))

        def write() -> list[str]:
            if isinstance(self.origin, Source):
                return export_like_source(
                    weights,
                    self.origin,
                    folder,
                    replaced_files=tokenizer_files,
                    overwrite=overwrite,
                    quantization=quantization,
                )
            present = {name: path for name, path in tokenizer_files.items() if path is not None}
            bindings, raw = self.origin.bindings, self.origin.raw
            export_new(
                weights, bindings, raw, folder, dtype=self.dtype, extra_files=present, overwrite=overwrite
            )
            return []

        return processes.agree(write)

    def _check_target(self, folder: Path, overwrite: bool, quantization: str) -> None:
        """Refuse before the processes begin to exchange weights, in which one that fails leaves the others."""
        FolderWriter(folder, overwrite=overwrite).check_room(self._stored_bytes(quantization))

    def _stored_bytes(self, quantization: str) -> int:
        if isinstance(self.origin, Source):
            return sum(shard.file_bytes for shard in exported_shards(self.origin, quantization))
        return count(model_params(self.spec)) * jnp.dtype(self.dtype).itemsize


def open_model(config: ModelConfig) -> RunModel:
    """Open the model that a run names, without loading its weights.

    Raises:
        UserError: the folder, its files or its config are missing, malformed or not supported.
    """
    origin = open_source(config.path) if config.path is not None else read_blueprint(config.config or {})
    return RunModel(origin, compute_dtype(config.dtype))
