"""Loading: a checkpoint folder → parameters on their devices, reading only the bytes that each shard needs."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import family_of
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.layout import DTYPES, TensorInfo, raise_problems
from jaxmoe.interop.reader import CheckpointFolder
from jaxmoe.interop.rules import Binding, Bindings, bind
from jaxmoe.params import Param, Tree, named
from jaxmoe.sharding import shardings
from jaxmoe.spec import ModelSpec, model_params

_FLOATS = ("BF16", "F16", "F32", "F64")
_ALIGNMENT = 64
"""Bytes; jax takes a host array so aligned as a CPU buffer without copying it."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")


class TensorReader(Protocol):
    """What loading needs of a place that holds tensors."""

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """The part `box` of tensor `name` seen with axes `sizes`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint folder, read as far as its config and the headers of its files.

    Attributes:
        folder: the Hugging Face folder.
        family: of its model_type.
        raw: config.json as it is.
        spec: the model that it describes.
        files: the safetensors files.
        bindings: which tensor holds which part of which parameter.
    """

    folder: Path
    family: Family
    raw: Mapping[str, Any]
    spec: ModelSpec
    files: CheckpointFolder
    bindings: Bindings


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A local folder, or the local snapshot of a hub repository (downloaded if need be; safetensors only).

    Raises:
        UserError: neither.
    """
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path_or_hub_id!r} is no folder here, and could not be downloaded from the hub: {reason}"
        ) from error


def open_source(path_or_hub_id: str | Path) -> Source:
    """Open a checkpoint and check that it is whole: every tensor there, of the right shape, and none unknown.

    Raises:
        UserError: whatever is wrong with it, all missing, surplus and misshapen tensors listed once.
    """
    folder = resolve_folder(path_or_hub_id)
    raw = read_config(folder / "config.json")
    family = family_of(raw, str(folder / "config.json"))
    spec = family.spec(raw, str(folder / "config.json"))
    files = CheckpointFolder(folder)
    bindings = bind(family.rules(spec), spec, files.tensors, family.ignored)
    raise_problems(folder, _problems(bindings, files))
    return Source(folder, family, raw, spec, files, bindings)


def load_params(source: Source, dtype: Any, mesh: Mesh | None = None) -> Tree:
    """Read the parameters, each device its own shard.

    Tensors are read and cast one at a time, straight into the arrays that the devices take over. On a CPU these are
    the devices' memory; for a GPU the host holds its part of one parameter (all layers of it) until it is copied.

    Args:
        source: an open checkpoint.
        dtype: of the arrays.
        mesh: shards them by `jaxmoe.sharding`; by default they are whole, on the first device.

    Raises:
        UserError: a file could not be read, a tied copy differs, a value overflows float16, or the mesh does not
            divide a dimension.
    """
    _check_copies(source)
    return read_params(source.files, source.spec, source.bindings, dtype, mesh)


def read_params(
    reader: TensorReader, spec: ModelSpec, bindings: Bindings, dtype: Any, mesh: Mesh | None = None
) -> Tree:
    """`load_params` from any reader of tensors."""
    tree = model_params(spec)
    placements = (
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), tree)
        if mesh is None
        else shardings(tree, mesh)
    )
    arrays = []
    for (name, declared), placement in zip(named(tree), jax.tree.leaves(placements), strict=True):
        shards = _ShardReader(reader, declared, bindings.of_parameter[name], np.dtype(dtype))
        arrays.append(jax.make_array_from_callback(declared.shape, placement, shards.read))
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


class _ShardReader:
    """Reads any rectangular part of one parameter; devices that hold the same part share one read."""

    def __init__(
        self, reader: TensorReader, declared: Param, parts: Sequence[Binding], dtype: np.dtype
    ) -> None:
        self._reader = reader
        self._declared = declared
        self._parts = parts
        self._dtype = dtype
        self._done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(self, index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(self._declared.shape)
        bounds = tuple(
            s.indices(size)[:2] for s, size in zip(index or whole, self._declared.shape, strict=True)
        )
        if bounds not in self._done:
            self._done[bounds] = self._assemble(bounds)
        return self._done[bounds]

    def _assemble(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        out = _aligned_empty(tuple(stop - start for start, stop in bounds), self._dtype)
        of_letter = dict(zip(self._declared.dims, bounds, strict=True))
        for part in self._parts:
            if any(not of_letter[letter][0] <= i < of_letter[letter][1] for letter, i in part.index.items()):
                continue
            box = [slice(*of_letter[letter]) for letter in part.letters]
            values = part.to_parameter(self._reader.read_box(part.source, part.sizes, box))
            place = tuple(
                part.index[letter] - of_letter[letter][0] if letter in part.index else slice(None)
                for letter in self._declared.dims
            )
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # a NaN stays one; what overflows is found below
                out[place] = values
            if self._dtype == np.float16:  # the only one of less range than what checkpoints are stored in
                _refuse_overflow(part.source, values, out[place])
        return out


def _refuse_overflow(name: str, stored: np.ndarray, loaded: np.ndarray) -> None:
    lost = np.isfinite(stored) & ~np.isfinite(loaded)
    if lost.any():
        largest = np.abs(stored[lost].astype(np.float64)).max()
        raise UserError(
            f"tensor {name}: value {largest:.6g} does not fit {loaded.dtype}; load it as bfloat16 or float32"
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def _problems(bindings: Bindings, files: CheckpointFolder) -> list[str]:
    problems = [f"tensor {name} is missing" for name in bindings.missing]
    problems += [f"tensor {name} is not part of the model" for name in bindings.surplus]
    for name, binding in bindings.of_tensor.items():
        info: TensorInfo | None = files.tensors.get(name)
        if info is None:
            continue
        if tuple(info.shape) != binding.shape:
            problems.append(f"tensor {name} has shape {list(info.shape)}, expected {list(binding.shape)}")
        if info.dtype not in _FLOATS:
            problems.append(f"tensor {name} has dtype {info.dtype}, expected one of {', '.join(_FLOATS)}")
    return problems


def _check_copies(source: Source) -> None:
    for copy, original in source.bindings.copies.items():
        chunks = itertools.zip_longest(source.files.iter_bytes(copy), source.files.iter_bytes(original))
        same = source.files.tensors[copy].dtype == source.files.tensors[original].dtype
        if not same or any(a != b for a, b in chunks):
            raise UserError(
                f"{source.folder}: the config ties {copy} to {original} but the file holds different values; "
                "set tie_word_embeddings to false, or drop the copy"
            )


class ArrayReader:
    """Reads from arrays in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """The part `box` of array `name` seen with axes `sizes`."""
        return self._arrays[name].reshape(sizes)[tuple(box)]


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a safetensors dtype such as "BF16"."""
    dtype = DTYPES[name].numpy
    if dtype is None:
        raise UserError(f"dtype {name} has no array form; expected one of {', '.join(_FLOATS)}")
    return dtype


def compute_dtype(name: Any) -> Any:
    """The dtype called "bfloat16", "float32" or "float16".

    Raises:
        UserError: anything else.
    """
    allowed = ("bfloat16", "float32", "float16")
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in allowed:
        raise UserError(f"dtype {text!r} is not supported: expected one of {', '.join(allowed)}")
    return jnp.dtype(text)
