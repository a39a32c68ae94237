"""Loading: a checkpoint folder → parameters on their devices, reading what they need once."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe.errors import UserError
from jaxmoe.files import why_unusable
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import family_of
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.quantization.folder import Files, open_files, split_config
from jaxmoe.interop.rules import Binding, Bindings, bind
from jaxmoe.interop.storage.format import DTYPES, TensorInfo, raise_problems
from jaxmoe.interop.storage.slices import Box, pieces
from jaxmoe.model.spec import ModelSpec, model_params
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Param, Tree, named

_FLOATS = ("BF16", "F16", "F32", "F64")
_ALIGNMENT = 64
"""Bytes; jax takes a host array so aligned as a CPU buffer without copying it."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")


PIECE_ELEMENTS = 8 << 20
"""A tensor is read in pieces of at most so many numbers."""

COMPUTE_DTYPES = ("bfloat16", "float32", "float16")


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
        files: the safetensors files; of a quantised folder, as if they were stored in bfloat16.
        bindings: which tensor holds which part of which parameter.
    """

    folder: Path
    family: Family
    raw: Mapping[str, Any]
    spec: ModelSpec
    files: Files
    bindings: Bindings


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
    plain, quantization = split_config(raw, str(folder / "config.json"))
    spec = family.spec(plain, str(folder / "config.json"))
    problems: list[str] = []
    files = open_files(folder, quantization, problems)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    bindings = bind(family.rules(spec), spec, shapes, family.ignored)
    raise_problems(folder, problems + _problems(bindings, files))
    return Source(folder, family, raw, spec, files, bindings)


def load_params(source: Source, dtype: Any, mesh: Mesh | None = None) -> Tree:
    """Read the parameters, each process what its own devices hold of them, once.

    Tensors are read piece by piece and cast into the arrays that the devices take over. On a CPU these are the
    devices' memory; for a GPU the host holds its part of one parameter (all layers of it) until it is copied.

    Args:
        source: an open checkpoint.
        dtype: of the arrays.
        mesh: shards them by `jaxmoe.parallel.sharding`; by default they are whole, on the first device.

    Raises:
        UserError: a file could not be read, a tied copy differs, a value overflows `dtype`, or the mesh does not
            divide a dimension.
    """
    check_copies(source)
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
        shards = LocalShards(declared, placement, np.dtype(declared.dtype(dtype)))
        for part in bindings.of_parameter[name]:
            shards.fill(part, reader)
        # Waiting keeps a host from holding a second parameter while the first is on its way to its devices.
        arrays.append(jax.make_array_from_callback(declared.shape, placement, shards.at).block_until_ready())
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


class LocalShards:
    """Host buffers of the shards of one parameter that this process's devices hold.

    Devices with the same shard share a buffer. What is read of a tensor goes to all shards that it is part of, so
    nothing is read twice.

    Args:
        declared: the parameter.
        placement: its sharding.
        dtype: of the buffers.
    """

    def __init__(self, declared: Param, placement: jax.sharding.Sharding, dtype: np.dtype) -> None:
        self._declared = declared
        indices = placement.addressable_devices_indices_map(declared.shape).values()
        self._buffers = {
            bounds: _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
            for bounds in map(self._bounds, indices)
        }

    def at(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The buffer of one shard, by its index in the parameter."""
        return self._buffers[self._bounds(index)]

    def fill(self, part: Binding, reader: TensorReader) -> None:
        """Read what the shards need of one tensor, in pieces of at most `PIECE_ELEMENTS`.

        Raises:
            UserError: the tensor could not be read, or a value overflows the buffers' dtype.
        """
        targets = list(self._targets(part))
        if not targets:
            return
        for piece in pieces(_cover([box for box, _ in targets]), PIECE_ELEMENTS):
            shared = [(_overlap(box, piece), box, buffer) for box, buffer in targets]
            shared = [target for target in shared if all(one.start < one.stop for one in target[0])]
            if not shared:
                continue
            read = _cover([overlap for overlap, _, _ in shared])
            values = reader.read_box(part.source, part.sizes, read)
            for overlap, box, buffer in shared:
                _store(part.source, values[_within(overlap, read)], buffer[_within(overlap, box)])

    def _targets(self, part: Binding) -> Iterator[tuple[Box, np.ndarray]]:
        """For each shard that has some of a tensor: its box in the tensor, and that part of its buffer."""
        dims = self._declared.dims
        free = [letter for letter in dims if letter not in part.index]
        for bounds, buffer in self._buffers.items():
            of_letter = {letter: slice(*one) for letter, one in zip(dims, bounds, strict=True)}
            if all(of_letter[letter].start <= i < of_letter[letter].stop for letter, i in part.index.items()):
                place = tuple(
                    part.index[letter] - of_letter[letter].start if letter in part.index else slice(None)
                    for letter in dims
                )
                view = buffer[place].transpose([free.index(letter) for letter in part.letters])
                yield tuple(of_letter[letter] for letter in part.letters), view

    def _bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        shape = self._declared.shape
        if index is None:
            return tuple((0, size) for size in shape)
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _cover(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    return tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis))
        for axis in zip(*boxes, strict=True)
    )


def _overlap(one: Box, other: Box) -> Box:
    return tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def _within(box: Box, outer: Box) -> Box:
    """`box` as an index into an array that holds `outer`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))


def _store(name: str, stored: np.ndarray, target: np.ndarray) -> None:
    """Cast `stored` into `target`, and refuse values that overflow its dtype."""
    with np.errstate(over="ignore", invalid="ignore"):  # a NaN stays one; what overflows is found below
        target[...] = stored
    if _largest(stored.dtype) <= _largest(target.dtype) or np.isfinite(target).all():
        return
    lost = np.isfinite(stored) & ~np.isfinite(target)
    if lost.any():
        largest = np.abs(stored[lost].astype(np.float64)).max()
        larger = [dtype for dtype in COMPUTE_DTYPES if _largest(dtype) >= largest]
        remedy = (
            f"load it as {' or '.join(larger)}" if larger else "no dtype that jaxmoe computes in holds it"
        )
        raise UserError(f"tensor {name}: value {largest:.6g} does not fit {target.dtype}; {remedy}")


def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def _problems(bindings: Bindings, files: Files) -> list[str]:
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


def check_copies(source: Source) -> None:
    """Compare tensors that the config ties to others with those; reads nothing where there are none.

    Raises:
        UserError: they differ.
    """
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
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in COMPUTE_DTYPES:
        raise UserError(f"dtype {text!r} is not supported: expected one of {', '.join(COMPUTE_DTYPES)}")
    return jnp.dtype(text)
