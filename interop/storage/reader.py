"""Lazy reading of a folder of safetensors files: only the bytes that are asked for, only into our own memory.

Reads go through pread, never mmap: mapped pages count as resident memory, and a process that touches every
shard of a large checkpoint would look as large as the checkpoint.
"""

import math
import operator
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided

from jaxmoe.errors import UserError, shortened
from jaxmoe.files import open_regular
from jaxmoe.interop.storage.format import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Shard,
    TensorInfo,
    parse_header,
)
from jaxmoe.interop.storage.index import find_files, index_mismatches
from jaxmoe.interop.storage.problems import raise_problems

BUFFER_BYTES = 4 << 20
# What one more read costs, in bytes that could have been read instead: about the latency of an NVMe drive or
# of a network file system's read-ahead window times its bandwidth.
READ_COST_BYTES = 64 << 10
_LFS_POINTER = b"version https://git-lfs"


class CheckpointFolder:
    """The tensors of a checkpoint folder, read on demand.

    The folder holds ``model.safetensors.index.json`` and the shards that it names, or ``model.safetensors``,
    or exactly one other ``*.safetensors``. Shards may lie in folders below it. Files may be links (the Hugging
    Face cache links into its blobs).

    Attributes: ``path``; ``shards`` in name order; ``tensors``, name → TensorInfo; ``index``, the parsed
    index or None; ``bytes_read``, bytes of tensor data read so far (headers not counted).

    Any number of threads may read at once; ``close`` only when they are done. Raises UserError with every
    problem found in the folder's index and headers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._count_lock = threading.Lock()
        self._files: dict[str, IO[bytes]] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._files)
        problems: list[str] = []
        self.index, files = find_files(self.path, problems)
        try:
            shards = [self._open_shard(file, problems) for file in sorted(files)]
            self.shards = tuple(shard for shard in shards if shard is not None)
            if self.index is not None:
                problems.extend(index_mismatches(self.index["weight_map"], self.shards))
            raise_problems(self.path, problems)
        except BaseException:
            self.close()
            raise
        self.tensors = {info.name: info for shard in self.shards for info in shard.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading afterwards raises ValueError."""
        self._finalizer()

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its stored dtype (ml_dtypes for bfloat16 and the fp8 types)."""
        shape = self._info(name).shape
        return self.read_box(name, shape, [slice(None)] * len(shape))

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """The part of a tensor that ``box`` selects, read without the rest.

        ``sizes`` splits the axes of the stored shape into finer ones: (2F, D) may be read as (2, F, D).
        ``box`` has one slice of step 1 per fine axis, within bounds. The result has the lengths of the
        slices as its shape and the stored dtype.

        Contiguous parts are read straight into the result. Short runs are read together with what lies
        between them where that is cheaper than one read each, at most 4 MiB at a time, which is also all
        the memory used beside the result.

        Raises UserError for an unknown name, ``sizes`` that do not fit the stored shape, a dtype below one
        byte and a file that fails to be read; ValueError for a bad ``box``.
        """
        info = self._info(name)
        dtype = DTYPES[info.dtype].numpy
        if dtype is None:
            raise UserError(
                f"{self.path / info.file}: tensor {name!r} has dtype {info.dtype}, "
                f"{DTYPES[info.dtype].bits} bits to an element, and no array form; it can only be copied"
            )
        if not _factors(info.shape, sizes):
            raise UserError(
                f"{self.path / info.file}: tensor {name!r} has shape {info.shape}, expected one that splits "
                f"into {tuple(sizes)}; the checkpoint does not fit its config"
            )
        starts, lengths = _bounds(name, sizes, box)
        out = np.empty(lengths, dtype)
        if out.size:
            strides = [dtype.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
            offset = info.start + sum(map(operator.mul, starts, strides))
            _BoxRead(self, info.file, strides, out).run(offset)
        return out

    def iter_bytes(self, name: str, chunk: int = BUFFER_BYTES) -> Iterator[bytearray]:
        """The tensor's bytes in order, at most ``chunk`` (positive) at a time, whatever its dtype."""
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected a positive number of bytes")
        return self._chunks(
            self._info(name), chunk
        )  # apart, so that mistakes raise here and not at the first next()

    def _chunks(self, info: TensorInfo, chunk: int) -> Iterator[bytearray]:
        for start in range(info.start, info.end, chunk):
            piece = bytearray(min(chunk, info.end - start))
            self.read_into(info.file, start, memoryview(piece))
            yield piece

    def read_into(self, file: str, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) from ``offset`` of a shard; UserError if the file ends early or fails."""
        if not self._finalizer.alive:
            raise ValueError(f"{self.path} is closed")
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._files[file].fileno(), [target[done:]], offset + done)
                if not count:
                    raise UserError(
                        f"{self.path / file}: ends before byte {offset + len(target):,}; it shrank while open"
                    )
                done += count
        except OSError as error:
            raise UserError(f"{self.path / file}: cannot be read: {error.strerror}") from error
        with self._count_lock:
            self.bytes_read += done

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise UserError(
                f"{self.path}: no tensor {name!r} among its {len(self.tensors)}; "
                "the checkpoint does not fit its config"
            ) from None

    def _open_shard(self, file: str, problems: list[str]) -> Shard | None:
        try:
            self._files[file] = open_regular(self.path / file)
            descriptor = self._files[file].fileno()
            size = os.fstat(descriptor).st_size
            header = _read_header(descriptor, size)
        except OSError as error:
            problems.append(f"{shortened(file)}: cannot be read: {error.strerror}")
        except ValueError as error:
            problems.append(f"{shortened(file)}: {error}")
        else:
            return parse_header(file, header, size, problems)
        return None


class _BoxRead:
    """One read of a box into ``out``, whose axes lie ``strides`` bytes apart in the file."""

    def __init__(self, folder: CheckpointFolder, file: str, strides: Sequence[int], out: np.ndarray) -> None:
        self.folder, self.file, self.strides, self.out = folder, file, strides, out
        self.scratch = np.empty(0, np.uint8)
        # For each axis, whether a box of the axes from here on is better read with all that lies between its
        # runs (True), or index by index. Equal boxes cost the same, so this is decided once, inside out.
        self.together: list[bool] = []
        cover = out.itemsize
        cost = cover + READ_COST_BYTES
        for length, stride in zip(reversed(out.shape), reversed(strides), strict=True):
            cover += (length - 1) * stride
            whole = cover + READ_COST_BYTES * math.ceil(cover / BUFFER_BYTES)
            self.together.insert(0, whole <= length * cost)
            cost = min(whole, length * cost)

    def run(self, offset: int) -> None:
        self._visit(0, offset, self.out)

    def _visit(self, axis: int, offset: int, out: np.ndarray) -> None:
        if out.ndim == 0 or self.together[axis]:
            self._cover(axis, offset, out)
            return
        for position in range(out.shape[0]):
            self._visit(axis + 1, offset + position * self.strides[axis], out[position, ...])

    def _cover(self, axis: int, offset: int, out: np.ndarray) -> None:
        """Read all from the first to the last byte of this part, in pieces that fit the scratch buffer."""
        strides = self.strides[axis:]
        cover = out.itemsize + sum(
            (length - 1) * stride for length, stride in zip(out.shape, strides, strict=True)
        )
        if cover == out.nbytes and out.flags.c_contiguous:
            self.folder.read_into(self.file, offset, out.reshape(-1).view(np.uint8).data)
        elif cover <= BUFFER_BYTES:
            if self.scratch.size < cover:
                self.scratch = np.empty(cover, np.uint8)
            piece = self.scratch[:cover]
            self.folder.read_into(self.file, offset, piece.data)
            out[...] = as_strided(piece.view(out.dtype), out.shape, strides)
        else:
            inner = cover - (out.shape[0] - 1) * strides[0]
            rows = max(1, (BUFFER_BYTES - inner) // strides[0] + 1)
            for row in range(0, out.shape[0], rows):
                start = offset + row * strides[0]
                if rows == 1:
                    self._cover(axis + 1, start, out[row, ...])
                else:
                    self._cover(axis, start, out[row : row + rows])


def _close_all(files: dict[str, IO[bytes]]) -> None:
    while files:
        files.popitem()[1].close()


def _factors(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether every axis of ``shape`` is the product of the next few ``sizes``."""
    if min(sizes, default=0) < 0:
        return False
    if 0 in shape or 0 in sizes:  # nothing to read, and no way to tell which axes make up the empty one
        return 0 in shape and 0 in sizes
    finer = iter([size for size in sizes if size != 1])
    for size in shape:
        product = 1
        while product < size:
            product *= next(finer, size + 1)
        if product != size:
            return False
    return next(finer, None) is None


def _bounds(name: str, sizes: Sequence[int], box: Sequence[slice]) -> tuple[list[int], tuple[int, ...]]:
    if len(box) != len(sizes):
        raise ValueError(f"{name}: box has {len(box)} slices, expected {len(sizes)} for {tuple(sizes)}")
    starts, lengths = [], []
    for size, part in zip(sizes, box, strict=True):
        start = 0 if part.start is None else operator.index(part.start)
        stop = size if part.stop is None else operator.index(part.stop)
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(
                f"{name}: slice {part} of an axis of {size}, expected 0 <= start <= stop <= {size}, step 1"
            )
        starts.append(start)
        lengths.append(stop - start)
    return starts, tuple(lengths)


def _read_header(descriptor: int, file_bytes: int) -> bytes:
    """The header without its length. Raises ValueError with what is wrong."""
    if not file_bytes:
        raise ValueError("is empty, expected a safetensors file; download it again")
    if file_bytes < LENGTH_BYTES:
        raise ValueError(f"has {file_bytes} bytes, too few for a safetensors file; download it again")
    first = os.pread(descriptor, len(_LFS_POINTER), 0)
    if first == _LFS_POINTER:
        raise ValueError("is a git-lfs pointer, expected the file that it stands for; run `git lfs pull`")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    available = file_bytes - LENGTH_BYTES
    if length > MAX_HEADER_BYTES or length > available:
        limit = "a file of" if length > available else f"at most {MAX_HEADER_BYTES:,}, in a file of"
        raise ValueError(
            f"announces a header of {length:,} bytes, {limit} {file_bytes:,}; "
            "truncated or no safetensors file, download it again"
        )
    header = os.pread(descriptor, length, LENGTH_BYTES)
    if len(header) < length:
        raise ValueError("shrank while it was read")
    return header
