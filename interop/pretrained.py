"""The public way in and out: Hugging Face folder ↔ `MoEModel`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import family_of
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.loading import compute_dtype, load_params, open_source
from jaxmoe.interop.quantization.folder import split_config
from jaxmoe.interop.rules import Bindings, bind
from jaxmoe.interop.saving import export_like_source, export_new
from jaxmoe.model.module import MoEModel
from jaxmoe.model.spec import ModelSpec, model_params
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import initialize


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model known by its config alone, without weights.

    Attributes:
        raw: the config.json, without ``quantization_config``.
        family: of its model_type.
        spec: the model.
        bindings: of the family's first layout.
    """

    raw: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    bindings: Bindings


def read_blueprint(config: str | Path | Mapping[str, Any]) -> Blueprint:
    """Read a config.json file, or take it as a mapping.

    Raises:
        UserError: it is missing, malformed or not supported.
    """
    raw, file = (
        (config, "model.config") if isinstance(config, Mapping) else (read_config(Path(config)), str(config))
    )
    if not isinstance(raw.get("model_type"), str):
        raise UserError(f"{file}: expected a string 'model_type', got {raw.get('model_type')!r}")
    family = family_of(raw, file)
    raw, _ = split_config(raw, file)
    spec = family.spec(raw, file)
    return Blueprint(raw, family, spec, bind(family.rules(spec), spec))


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
        UserError: as `read_blueprint`.
    """
    dtype = compute_dtype(dtype)
    blueprint = read_blueprint(config)
    tree = model_params(blueprint.spec)
    placement = None if mesh is None else shardings(tree, mesh)
    params = initialize(tree, jax.random.key(seed), blueprint.spec.init_std, dtype, placement)
    return MoEModel(blueprint.spec, params, dtype, mesh, blueprint)


def save_pretrained(
    model: MoEModel, folder: str | Path, *, overwrite: bool = False, quantization: str = "none"
) -> None:
    """Write a model as a Hugging Face folder; see `jaxmoe.interop.saving` for what it repeats of its source.

    Args:
        model: from `from_pretrained` or `from_config`.
        folder: a new or empty folder.
        overwrite: replace an existing checkpoint folder as a whole.
        quantization: "none": what the source has quantised is written in bfloat16; "source": as the source has it.

    Raises:
        UserError: the folder cannot be written, or the model has no source whose format it could have.
    """
    if isinstance(model.source, Blueprint):
        if quantization != "none":
            raise UserError(
                f"quantization {quantization!r}: the model has random weights and no source; expected 'none'"
            )
        export_new(
            model.pure_params(),
            model.source.bindings,
            model.source.raw,
            folder,
            dtype=model.dtype,
            overwrite=overwrite,
        )
    else:
        export_like_source(
            model.pure_params(), model.source, folder, overwrite=overwrite, quantization=quantization
        )
