"""Where a model comes from: a checkpoint folder, or a config.json alone."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import family_of
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.locating import resolve_folder
from jaxmoe.interop.quantization.config import split_config
from jaxmoe.interop.quantization.expected import expected_tensors
from jaxmoe.interop.quantization.folder import Files, QuantizedFolder, is_zero_bias, open_files
from jaxmoe.interop.quantization.stored_form import Format, QuantizedTensor
from jaxmoe.interop.rules import Bindings, bind, tensor_count
from jaxmoe.interop.storage.format import MAX_TENSORS, TensorInfo
from jaxmoe.interop.storage.problems import raise_problems
from jaxmoe.interop.storage.slices import pieces
from jaxmoe.kernels.logs import log_once
from jaxmoe.model.spec import ModelSpec

_log = logging.getLogger(__name__)

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes of tensors that can be loaded."""

Mtp = Literal["declared", "present"]
"""See `Source`."""

COMPUTE_DTYPES = ("bfloat16", "float32", "float16")

_PIECE_ELEMENTS = 1 << 20
"""Tied tensors are compared in pieces of at most so many numbers."""


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
        format: in which the config says that weights are quantised, if it does.
        beside: tensors by name that are not the model's (towers of other modalities) and that an export without a
            folder to follow takes along.
        mtp: whether config.json of an export counts layers for multi-token prediction as this one does ("declared"),
            or 0 of them where it has none ("present").
    """

    family: Family
    raw: Mapping[str, Any]
    spec: ModelSpec
    bindings: Bindings
    folder: Path | None = None
    files: Files | None = None
    format: Format | None = None
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    mtp: Mtp = "declared"

    @property
    def opened(self) -> tuple[Path, Files]:
        """The folder and its files.

        Raises:
            ValueError: the model is known by its config alone.
        """
        if self.folder is None or self.files is None:
            raise ValueError("this model is known by its config alone and has no folder")
        return self.folder, self.files

    @property
    def quantized(self) -> Mapping[str, QuantizedTensor]:
        """Quantised tensors by name; without a folder those that its makers' would have."""
        if self.files is not None:
            return self.files.quantized if isinstance(self.files, QuantizedFolder) else {}
        return {} if self.format is None else expected_tensors(self.format, self.bindings)

    @property
    def lacking(self) -> dict[str, int]:
        """Fields that count layers for multi-token prediction, which an export will not have; see `Family.lacking`."""
        tensors = self.beside if self.files is None else self.files.tensors
        return self.family.lacking(self.raw, self.spec, tensors.keys())

    def grouped(self, spec: ModelSpec) -> "Source":
        """The same model with its layers grouped as in `spec`."""
        shapes = None
        if self.files is not None:
            shapes = {name: info.shape for name, info in self.files.tensors.items()}
        bindings = bind(self.family.rules(spec), spec, shapes, self.family.beside(self.raw, spec))
        return dataclasses.replace(self, spec=spec, bindings=bindings)


def open_source(path_or_hub_id: str | Path) -> Source:
    """Open a checkpoint and check that it is whole: every tensor there, of the right shape, and none unknown.

    Where the transformers that wrote it is known to have computed something else, a line in the log says so.

    Raises:
        UserError: whatever is wrong with it, all missing, surplus and misshapen tensors listed once.
    """
    folder = resolve_folder(path_or_hub_id)
    raw = read_config(folder / "config.json")
    file = str(folder / "config.json")
    family = family_of(raw, file)
    plain, quantization = split_config(raw, file, folder)
    spec = _plausible_spec(family, plain, file)
    problems: list[str] = []
    files = open_files(folder, quantization, problems)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    bindings = bind(family.rules(spec), spec, shapes, family.beside(raw, spec))
    raise_problems(folder, problems + _problems(bindings, files))
    for note in family.notes(raw):
        log_once(_log, logging.WARNING, f"{folder / 'config.json'}: {note}")
    return Source(family, raw, spec, bindings, folder, files, quantization)


def config_source(config: str | Path | Mapping[str, Any]) -> Source:
    """The model of a config.json file, or of its content as a mapping.

    Raises:
        UserError: it is missing, malformed or not supported.
    """
    raw, file = (
        (config, "model.config") if isinstance(config, Mapping) else (read_config(Path(config)), str(config))
    )
    if not isinstance(raw.get("model_type"), str):
        raise UserError(f"{file}: expected a string 'model_type', got {quote(raw.get('model_type'))}")
    family = family_of(raw, file)
    raw, quantization = split_config(raw, file)
    spec = _plausible_spec(family, raw, file)
    return Source(family, raw, spec, bind(family.rules(spec), spec), format=quantization)


def _plausible_spec(family: Family, raw: Mapping[str, Any], file: str) -> ModelSpec:
    spec = family.spec(raw, file)
    count = tensor_count(family.rules(spec), spec)
    if count > MAX_TENSORS:
        raise UserError(
            f"{file}: describes a model of {count:,} tensors, expected at most {MAX_TENSORS:,}: mend the number of its "
            "layers or experts"
        )
    return spec


def _problems(bindings: Bindings, files: Files) -> list[str]:
    problems = [f"tensor {name} is missing" for name in bindings.missing]
    surplus = (name for name in bindings.surplus if not is_zero_bias(files, name))
    problems += [f"tensor {name} is not part of the model" for name in surplus]
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

    A copy may have another dtype: it repeats the other tensor if that, rounded to its dtype, has its bits.

    Raises:
        UserError: they differ.
    """
    for copy, original in source.bindings.copies.items():
        if source.files is not None and not _repeats(source.files, copy, original):
            raise UserError(
                f"{source.folder}: the config ties {copy} to {original} but the file holds different values; "
                "set tie_word_embeddings to false, or drop the copy"
            )


def _repeats(files: Files, copy: str, original: str) -> bool:
    shape = files.tensors[copy].shape
    for box in pieces([slice(0, size) for size in shape], _PIECE_ELEMENTS):
        held, other = (files.read_box(name, shape, box) for name in (copy, original))
        with np.errstate(over="ignore", invalid="ignore"):
            expected = other.astype(held.dtype)
        if held.tobytes() != expected.tobytes():
            return False
    return True


def compute_dtype(name: Any) -> Any:
    """The dtype called "bfloat16", "float32" or "float16".

    Raises:
        UserError: anything else.
    """
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in COMPUTE_DTYPES:
        raise UserError(f"dtype {text!r} is not supported: expected one of {', '.join(COMPUTE_DTYPES)}")
    return jnp.dtype(text)
