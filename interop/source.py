"""Where a model comes from: a checkpoint folder, or a config.json alone."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import UserError, first_line
from jaxmoe.files import why_unusable
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import family_of
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.quantization.folder import Files, open_files, split_config
from jaxmoe.interop.rules import Bindings, bind
from jaxmoe.interop.storage.format import TensorInfo, raise_problems
from jaxmoe.kernels.logs import log_once
from jaxmoe.model.spec import ModelSpec

_log = logging.getLogger(__name__)

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes of tensors that can be loaded."""

COMPUTE_DTYPES = ("bfloat16", "float32", "float16")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is known and not yet loaded.

    Attributes:
        family: of its model_type.
        raw: config.json; without a folder it has no ``quantization_config``.
        spec: the model that it describes.
        bindings: which tensor holds which part of which parameter; without a folder in the family's first layout.
        folder: the Hugging Face folder, read as far as its config and the headers of its files; None where the
            model is known by its config alone, whose weights are random or somebody else's.
        files: the folder's safetensors files; of a quantised one, as if they were stored in bfloat16.
        beside: tensors by name that are not the model's (towers of other modalities) and that an export without a
            folder to follow takes along.
    """

    family: Family
    raw: Mapping[str, Any]
    spec: ModelSpec
    bindings: Bindings
    folder: Path | None = None
    files: Files | None = None
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def opened(self) -> tuple[Path, Files]:
        """The folder and its files.

        Raises:
            ValueError: the model is known by its config alone.
        """
        if self.folder is None or self.files is None:
            raise ValueError("this model is known by its config alone and has no folder")
        return self.folder, self.files

    def grouped(self, spec: ModelSpec) -> "Source":
        """The same model with its layers grouped as in `spec`."""
        shapes = None
        if self.files is not None:
            shapes = {name: info.shape for name, info in self.files.tensors.items()}
        bindings = bind(self.family.rules(spec), spec, shapes, self.family.ignored)
        return dataclasses.replace(self, spec=spec, bindings=bindings)


def open_source(path_or_hub_id: str | Path) -> Source:
    """Open a checkpoint and check that it is whole: every tensor there, of the right shape, and none unknown.

    Where the transformers that wrote it is known to have computed something else, a line in the log says so.

    Raises:
        UserError: whatever is wrong with it, all missing, surplus and misshapen tensors listed once.
    """
    folder = resolve_folder(path_or_hub_id)
    raw = read_config(folder / "config.json")
    family = family_of(raw, str(folder / "config.json"))
    plain, quantization = split_config(raw, str(folder / "config.json"))
    spec = family.spec(plain, str(folder / "config.json"))
    problems: list[str] = []
    files = open_files(folder, quantization, problems)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    bindings = bind(family.rules(spec), spec, shapes, family.ignored)
    raise_problems(folder, problems + _problems(bindings, files))
    for note in family.notes(raw):
        log_once(_log, logging.WARNING, f"{folder / 'config.json'}: {note}")
    return Source(family, raw, spec, bindings, folder, files)


def config_source(config: str | Path | Mapping[str, Any]) -> Source:
    """The model of a config.json file, or of its content as a mapping.

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
    return Source(family, raw, spec, bind(family.rules(spec), spec))


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A local folder, or the local snapshot of a hub repository (downloaded if need be; safetensors only).

    Raises:
        UserError: neither.
    """
    if bad := why_unusable(path_or_hub_id):
        raise UserError(f"{bad}; give a folder with config.json, or a hub id like org/name")
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise UserError(f"{path}: is a file, expected a folder with config.json; give {path.parent}")
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise UserError(
            f"model folder {path} does not exist: give a folder with config.json, or a hub id like org/name"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_hub_id), allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client's own errors, and those of three network libraries
        raise UserError(
            f"{path_or_hub_id!r} is no folder here, and could not be downloaded from the hub: {first_line(error)}"
        ) from error


def _problems(bindings: Bindings, files: Files) -> list[str]:
    problems = [f"tensor {name} is missing" for name in bindings.missing]
    problems += [f"tensor {name} is not part of the model" for name in bindings.surplus]
    for name, binding in bindings.of_tensor.items():
        info: TensorInfo | None = files.tensors.get(name)
        if info is None:
            continue
        if tuple(info.shape) != binding.shape:
            problems.append(f"tensor {name} has shape {list(info.shape)}, expected {list(binding.shape)}")
        if info.dtype not in FLOATS:
            problems.append(f"tensor {name} has dtype {info.dtype}, expected one of {', '.join(FLOATS)}")
    return problems


def check_copies(source: Source) -> None:
    """Compare tensors that the config ties to others with those; reads nothing where there are none.

    Raises:
        UserError: they differ.
    """
    if source.files is None:
        return
    for copy, original in source.bindings.copies.items():
        chunks = itertools.zip_longest(source.files.iter_bytes(copy), source.files.iter_bytes(original))
        same = source.files.tensors[copy].dtype == source.files.tensors[original].dtype
        if not same or any(a != b for a, b in chunks):
            raise UserError(
                f"{source.folder}: the config ties {copy} to {original} but the file holds different values; "
                "set tie_word_embeddings to false, or drop the copy"
            )


def compute_dtype(name: Any) -> Any:
    """The dtype called "bfloat16", "float32" or "float16".

    Raises:
        UserError: anything else.
    """
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in COMPUTE_DTYPES:
        raise UserError(f"dtype {text!r} is not supported: expected one of {', '.join(COMPUTE_DTYPES)}")
    return jnp.dtype(text)
