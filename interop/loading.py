"""Loading: a checkpoint folder → parameters on their devices, reading what they need once."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe.errors import UserError
from jaxmoe.interop.rules import Binding, Bindings
from jaxmoe.interop.source import COMPUTE_DTYPES, FLOATS, Source, check_copies
from jaxmoe.interop.storage.format import DTYPES
from jaxmoe.interop.storage.slices import Box, pieces
from jaxmoe.model.spec import ModelSpec
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Param, Tree, dtypes, is_none, named

_ALIGNMENT = 64
"""Bytes; jax takes a host array so aligned as a CPU buffer without copying it."""

PIECE_ELEMENTS = 8 << 20
"""A tensor is read in pieces of at most so many numbers."""


class TensorReader(Protocol):
    """What loading needs of a place that holds tensors."""

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """The part `box` of tensor `name` seen with axes `sizes`."""


def load_params(source: Source, dtype: Any, mesh: Mesh | None = None) -> Tree:
    """Read the parameters, each process what its own devices hold of them, once.

    Tensors are read piece by piece and cast into the arrays that the devices take over. On a CPU these are the
    devices' memory; for a GPU the process holds its part of one parameter (all layers of it) until it is copied.

    Args:
        source: an open checkpoint.
        dtype: of the arrays but those kept in float32, or a tree with that of each, None for those not wanted.
        mesh: shards them by `jaxmoe.parallel.sharding`; by default they are whole, on the first device.

    Raises:
        UserError: a file could not be read, a tied copy differs, a value overflows `dtype`, or the mesh does not
            divide a dimension.
    """
    _, files = source.opened
    check_copies(source)
    return read_params(files, source.spec, source.bindings, dtype, mesh)


def read_params(
    reader: TensorReader, spec: ModelSpec, bindings: Bindings, dtype: Any, mesh: Mesh | None = None
) -> Tree:
    """`load_params` from any reader of tensors."""
    tree = spec.declared
    placements = (
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), tree)
        if mesh is None
        else shardings(tree, mesh)
    )
    arrays: list[jax.Array | None] = []
    kinds = jax.tree.leaves(dtypes(tree, dtype), is_leaf=is_none)
    for (name, declared), placement, kind in zip(
        named(tree), jax.tree.leaves(placements), kinds, strict=True
    ):
        if kind is None:
            arrays.append(None)
            continue
        shards = LocalShards(declared, placement, np.dtype(kind))
        for part in bindings.of_parameter[name]:
            shards.fill(part, reader)
        # Waiting keeps a process from holding a second parameter while the first is on its way to its devices.
        arrays.append(jax.make_array_from_callback(declared.shape, placement, shards.at).block_until_ready())
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


class Parts:
    """The tensors that together hold a parameter, found by the index of some of its letters.

    Args:
        parts: all of them, which may be tens of thousands.
        letters: of the parameter.
    """

    def __init__(self, parts: Sequence[Binding], letters: str) -> None:
        self._letters = letters
        self._found: dict[tuple[int | None, ...], list[Binding]] = {}
        for part in parts:
            self._found.setdefault(tuple(part.index.get(letter) for letter in letters), []).append(part)
        self._named = {tuple(i is not None for i in key) for key in self._found}

    def at(self, index: Sequence[int]) -> list[Binding]:
        """Those that hold anything at an index, one number for each letter."""
        keys = (
            tuple(i if by_name else None for i, by_name in zip(index, one, strict=True))
            for one in self._named
        )
        return [part for key in keys for part in self._found.get(key, ())]


@dataclasses.dataclass(frozen=True)
class Inside:
    """What one tensor holds of a part of a parameter.

    Attributes:
        binding: of the tensor.
        box: in the tensor, on its letters.
        order: of the axes of what is read there, those that the part has not got first.
        at: where it is in the part.
    """

    binding: Binding
    box: Box
    order: tuple[int, ...]
    at: tuple[int | slice, ...]

    def put(self, read: np.ndarray, values: np.ndarray) -> None:
        """Put what was read into the part."""
        values[self.at] = read.transpose(self.order).reshape(values[self.at].shape)


def inside(declared: Param, parts: Sequence[Binding], fixed: Mapping[str, int]) -> Iterator[Inside]:
    """What tensors hold of the part of a parameter at the index of some letters, see `read_at`."""
    free = [letter for letter in declared.dims if letter not in fixed]
    for part in parts:
        held = part.held
        if any(not held[letter].start <= i < held[letter].stop for letter, i in fixed.items()):
            continue
        box = tuple(
            slice(fixed[letter] - held[letter].start, fixed[letter] - held[letter].start + 1)
            if letter in fixed
            else slice(0, size)
            for letter, size in zip(part.letters, part.sizes, strict=True)
        )
        order = [place for place, letter in enumerate(part.letters) if letter in fixed]
        order += [part.letters.index(letter) for letter in free if letter in part.letters]
        at = tuple(part.index.get(letter, held[letter]) for letter in free)
        yield Inside(part, box, tuple(order), at)


def read_at(
    reader: TensorReader, declared: Param, parts: Sequence[Binding], fixed: Mapping[str, int]
) -> np.ndarray:
    """A part of one parameter, in the dtype that the checkpoint has.

    Args:
        reader: of the checkpoint.
        declared: the parameter.
        parts: tensors that together hold it.
        fixed: letters of the parameter, and the index of each.

    Returns:
        The part, with the parameter's other letters in their order.
    """
    sizes = dict(zip(declared.dims, declared.shape, strict=True))
    values: np.ndarray | None = None
    for part in inside(declared, parts, fixed):
        read = reader.read_box(part.binding.source, part.binding.sizes, part.box)
        if values is None:
            values = np.empty([sizes[letter] for letter in declared.dims if letter not in fixed], read.dtype)
        part.put(read, values)
    assert values is not None  # bindings cover their parameter
    return values


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
        axes = {letter: axis for axis, letter in enumerate(dims)}
        fixed = [axes[letter] for letter in part.index]
        held = tuple(part.held.values())  # in the order of dims
        for bounds, buffer in self._buffers.items():
            shard = tuple(slice(*one) for one in bounds)
            shared = _overlap(held, shard)
            if any(one.start >= one.stop for one in shared):
                continue
            in_tensor = _within(shared, held)
            view = buffer[_within(shared, shard)]
            view = view.transpose([*fixed, *(axes[letter] for letter in part.letters)])
            yield tuple(in_tensor[axes[letter]] for letter in part.letters), view[(0,) * len(fixed)]

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
        raise UserError(f"dtype {name} has no array form; expected one of {', '.join(FLOATS)}")
    return dtype
