"""The public way in and out: Hugging Face folder ↔ `MoEModel`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe.interop.loading import load_params
from jaxmoe.interop.saving import write_folder
from jaxmoe.interop.source import Mtp, compute_dtype, config_source, open_source
from jaxmoe.model.module import MoEModel
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import initialize


def from_pretrained(
    folder_or_hub_id: str | Path, dtype: Any = "bfloat16", mesh: Mesh | None = None
) -> MoEModel:
    """Load a Hugging Face checkpoint.

    Args:
        folder_or_hub_id: a folder with config.json and safetensors, or a hub id like ``org/name``.
        dtype: of the parameters and of the computation: "bfloat16", "float32" or "float16".
        mesh: as from `jaxmoe.parallel.sharding.make_mesh`; shards the parameters over it.

    Returns:
        A Flax nnx module: ``model(tokens)`` gives logits, ``model.spec`` its `ModelSpec`.

    Raises:
        UserError: the folder, its config or a tensor is missing, malformed or not supported.
    """
    dtype = compute_dtype(dtype)
    source = open_source(folder_or_hub_id)
    return MoEModel(source.spec, load_params(source, dtype, mesh), dtype, mesh, source)


def from_config(
    config: str | Path | Mapping[str, Any], dtype: Any = "bfloat16", mesh: Mesh | None = None, seed: int = 0
) -> MoEModel:
    """A model with random weights.

    Args:
        config: a config.json file, or its content.
        dtype: as in `from_pretrained`.
        mesh: as in `from_pretrained`.
        seed: of the weights.

    Raises:
        UserError: as `jaxmoe.interop.source.config_source`.
    """
    dtype = compute_dtype(dtype)
    source = config_source(config)
    declared = source.spec.declared
    placement = None if mesh is None else shardings(declared, mesh)
    params = initialize(declared, jax.random.key(seed), source.spec.init_std, dtype, placement)
    return MoEModel(source.spec, params, dtype, mesh, source)


def save_pretrained(
    model: MoEModel,
    folder: str | Path,
    *,
    overwrite: bool = False,
    quantization: str = "none",
    mtp: Mtp = "declared",
) -> None:
    """Write a model as a Hugging Face folder; see `jaxmoe.interop.saving` for what it repeats of its source.

    Args:
        model: from `from_pretrained`, `from_config` or `jaxmoe.interop.torch_bridge.from_torch`.
        folder: a new or empty folder.
        overwrite: replace an existing checkpoint folder as a whole.
        quantization: "none": what the source has quantised is written in bfloat16; "source": as the source has it.
        mtp: "present": config.json counts 0 layers for multi-token prediction where the model came without their
            tensors; "declared": it counts them as the source's does.

    Raises:
        ValueError: the model was made by hand and nothing says what its tensors are called.
        UserError: the folder cannot be written, or the model has no source whose format it could have.
    """
    if model.source is None:
        raise ValueError(
            "this model has no source: make it with source=jaxmoe.interop.source.config_source(its config.json)"
        )
    write_folder(
        model.pure_params(),
        dataclasses.replace(model.source, mtp=mtp),
        folder,
        dtype=model.dtype,
        overwrite=overwrite,
        quantization=quantization,
    )
