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
from typing import Any, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided

from jaxmoe.errors import UserError, listed, quote
from jaxmoe.interop.storage.format import (
    DTYPES,
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    Shard,
    TensorInfo,
    is_inside,
    loads_strict,
    parse_header,
    raise_problems,
)

_MAX_LISTED = 20
BUFFER_BYTES = 4 << 20
# What one more read costs, in bytes that could have been read instead: about the latency of an NVMe drive or
# of a network file system's read-ahead window times its bandwidth.
READ_COST_BYTES = 64 << 10
_OTHER_FORMATS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}
_LFS_POINTER = b"version https://git-lfs"


class CheckpointFolder:
    """The tensors of a checkpoint folder, read on demand.

    The folder holds ``model.safetensors.index.json`` and the shards that it names, or ``model.safetensors``,
    or exactly one other ``*.safetensors``. Files may be links (the Hugging Face cache links into its blobs).

    Attributes: ``path``; ``shards`` in name order; ``tensors``, name → TensorInfo; ``index``, the parsed
    index or None; ``bytes_read``, bytes of tensor data read so far (headers not counted).

    Any number of threads may read at once; ``close`` only when they are done. Raises UserError with every
    problem found in the folder's index and headers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._count_lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._descriptors)
        problems: list[str] = []
        self.index, files = _find_files(self.path, problems)
        try:
            shards = [self._open_shard(file, problems) for file in sorted(files)]
            self.shards = tuple(shard for shard in shards if shard is not None)
            if self.index is not None:
                problems.extend(_index_mismatches(self.index["weight_map"], self.shards))
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
                count = os.preadv(self._descriptors[file], [target[done:]], offset + done)
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
            descriptor = os.open(
                self.path / file, os.O_RDONLY | os.O_NONBLOCK
            )  # a pipe must not make us wait
            self._descriptors[file] = descriptor
            size = os.fstat(descriptor).st_size
            header = _read_header(descriptor, size)
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
        except ValueError as error:
            problems.append(f"{file}: {error}")
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


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


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


def _find_files(folder: Path, problems: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The parsed index, if any, and the names of the shards that exist."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder, expected a folder with {INDEX_FILE} or {SINGLE_FILE}")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is a file, expected a folder; give the folder that holds it, {folder.parent}"
        )
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
    if INDEX_FILE in present:
        return _read_index(folder, problems)
    found = [name for name in present if name.endswith(".safetensors")]
    if SINGLE_FILE in found or len(found) == 1:
        return None, [SINGLE_FILE if SINGLE_FILE in found else found[0]]
    if found:
        raise UserError(
            f"{folder}: {len(found)} safetensors files ({listed(found, _MAX_LISTED)}) but no {INDEX_FILE}, "
            "which says what they hold; download the index too"
        )
    others = [name for name in present if Path(name).suffix in _OTHER_FORMATS]
    hint = (
        f"; found {listed(others, _MAX_LISTED)}: convert to safetensors first (save_pretrained of transformers does)"
        if others
        else f"; expected {INDEX_FILE} or {SINGLE_FILE}"
    )
    raise UserError(f"{folder}: no safetensors files{hint}")


def _read_index(folder: Path, problems: list[str]) -> tuple[dict[str, Any], list[str]]:
    where = folder / INDEX_FILE
    try:
        index = loads_strict(where.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{where}: damaged: {error}; download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: no weight_map, expected an object that names the file of every tensor")
    files, missing = [], []
    for file in sorted(set(map(_as_text, weight_map.values()))):
        if not is_inside(file) or "/" in file or not file.endswith(".safetensors"):
            problems.append(
                f"{INDEX_FILE}: names {quote(file)}, expected the plain name of a safetensors file here"
            )
        elif not (folder / file).is_file():
            missing.append(file)
        else:
            files.append(file)
    if missing:
        problems.append(
            f"{len(missing)} of the {len(missing) + len(files)} shards that {INDEX_FILE} names are missing: "
            f"{', '.join(missing)}; download them"
        )
    if SINGLE_FILE not in files and (folder / SINGLE_FILE).exists():
        problems.append(
            f"{SINGLE_FILE} lies beside {INDEX_FILE}, which does not name it: two checkpoints in one folder; "
            "remove one of them"
        )
    return index, files


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _index_mismatches(weight_map: dict[str, Any], shards: Sequence[Shard]) -> Iterator[str]:
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for info in shard.tensors:
            holders.setdefault(info.name, []).append(shard.file)
    for name, files in holders.items():
        if len(files) > 1:
            yield f"tensor {quote(name)} is stored more than once, in {listed(files, _MAX_LISTED)}; expected one file"
        elif name not in weight_map:
            yield f"{files[0]}: holds tensor {quote(name)}, which {INDEX_FILE} does not name"
        elif weight_map[name] != files[0]:
            place = quote(weight_map[name])
            yield f"{files[0]}: holds tensor {quote(name)}, which {INDEX_FILE} places in {place}"
    readable = {shard.file for shard in shards}
    for name, file in weight_map.items():
        if name not in holders and _as_text(file) in readable:
            yield f"{file}: lacks tensor {quote(name)}, which {INDEX_FILE} places there"


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
