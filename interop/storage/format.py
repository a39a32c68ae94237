"""The safetensors file format: element types, headers, and the checks that make a header trustworthy.

A file is an 8-byte little-endian length, that many bytes of JSON (padded with spaces), then the tensors'
bytes in C order and little-endian, without holes. Format: https://github.com/huggingface/safetensors.
"""

import dataclasses
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.errors import quote

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
OTHER_WEIGHTS = frozenset(
    [".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".pkl", ".distcp"]
)
"""Suffixes of weights in formats that are not read."""
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 500_000  # of a checkpoint; the largest published ones have 200,000
_VALUES_PER_TENSOR = 16  # in a header: two brackets, a brace, four colons, and commas for five axes
_VALUES_OF_METADATA = 100_000
_MAX_FAULTS = 1000  # told of one file: more than a message has room for, once what is alike is merged
_MAX_AXES = 64  # numpy's limit


@dataclass(frozen=True)
class DType:
    """An element type: its width in bits, and the numpy dtype that holds it (None below one byte)."""

    bits: int
    numpy: np.dtype | None


# In safetensors' own order of increasing alignment, which decides the order of the tensors in a file.
DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "BOOL": DType(8, np.dtype(np.bool_)),
        "F4": DType(4, None),  # packed two to a byte; ml_dtypes would spend a byte on each
        "F6_E2M3": DType(6, None),
        "F6_E3M2": DType(6, None),
        "U8": DType(8, np.dtype(np.uint8)),
        "I8": DType(8, np.dtype(np.int8)),
        "F8_E5M2": DType(8, np.dtype(ml_dtypes.float8_e5m2)),
        "F8_E4M3": DType(8, np.dtype(ml_dtypes.float8_e4m3fn)),
        "F8_E8M0": DType(8, np.dtype(ml_dtypes.float8_e8m0fnu)),
        "F8_E4M3FNUZ": DType(8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
        "F8_E5M2FNUZ": DType(8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
        "I16": DType(16, np.dtype(np.int16)),
        "U16": DType(16, np.dtype(np.uint16)),
        "F16": DType(16, np.dtype(np.float16)),
        "BF16": DType(16, np.dtype(ml_dtypes.bfloat16)),
        "I32": DType(32, np.dtype(np.int32)),
        "U32": DType(32, np.dtype(np.uint32)),
        "F32": DType(32, np.dtype(np.float32)),
        "C64": DType(64, np.dtype(np.complex64)),
        "F64": DType(64, np.dtype(np.float64)),
        "I64": DType(64, np.dtype(np.int64)),
        "U64": DType(64, np.dtype(np.uint64)),
    }
)
_NAME_OF = {entry.numpy: name for name, entry in DTYPES.items() if entry.numpy is not None}
_RANK_OF = {name: rank for rank, name in enumerate(DTYPES)}


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a numpy dtype, such as "BF16". Raises ValueError where there is none."""
    try:
        return _NAME_OF[np.dtype(dtype)]
    except KeyError:
        raise ValueError(
            f"dtype {np.dtype(dtype)} cannot be stored; expected one of {sorted(_NAME_OF.values())}"
        ) from None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes ``start`` to ``end`` (absolute) of ``file``, a name within the folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in offset order, and its header bytes as they stand, padding included.

    ``header`` excludes the 8-byte length. Writing ``prefix`` and then the tensors repeats the file exactly.
    """

    file: str
    metadata: dict[str, str] | None
    tensors: tuple[TensorInfo, ...]
    header: bytes

    def renamed(self, file: str) -> "Shard":
        """The same content under another name."""
        tensors = tuple(dataclasses.replace(info, file=file) for info in self.tensors)
        return dataclasses.replace(self, file=file, tensors=tensors)

    @property
    def prefix(self) -> bytes:
        return len(self.header).to_bytes(LENGTH_BYTES, "little") + self.header

    @property
    def file_bytes(self) -> int:
        return LENGTH_BYTES + len(self.header) + sum(info.nbytes for info in self.tensors)


def is_inside(name: str) -> bool:
    """Whether ``name`` is a relative path that stays inside its folder. A backslash is a letter, as on POSIX."""
    path = PurePosixPath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character, which JSON can spell and no path has
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def element_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises ValueError for an unknown dtype or a size that is not in whole bytes."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {quote(dtype)}, expected one of {', '.join(DTYPES)}")
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of {dtype} is {bits} bits, expected whole bytes")
    return bits // 8


def loads_strict(text: bytes, most: int) -> Any:
    """Parse UTF-8 JSON; ValueError for anything else, repeated keys and NaN included.

    Also for more than `most` colons, commas and brackets: what is parsed takes up to thirty times the room of the text.
    """
    found = sum(map(text.count, (b":", b",", b"[", b"{")))
    if found > most:
        raise ValueError(f"it holds {found:,} keys and values, expected at most {most:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {quote(twice)} appears twice")
        return result

    def constant(word: str) -> None:
        raise ValueError(f"{word} is no JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON of a sane depth") from None


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(
            f"is described by {quote(entry)}, expected an object with dtype, shape, data_offsets"
        )
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {quote(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_natural, shape)):
        raise ValueError(f"shape {quote(shape)}, expected up to {_MAX_AXES} integers that are not negative")
    if math.prod(max(size, 1) for size in shape) * 8 >= 2**63:
        raise ValueError(f"shape {quote(shape)} is too large to address")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError(f"data_offsets {quote(offsets)}, expected two integers that are not negative")
    start, end = offsets
    expected = element_bytes(dtype, shape)
    if end - start != expected:
        raise ValueError(
            f"bytes {start} to {end} are {end - start} bytes, but {dtype} of shape {shape} takes {expected}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _parse_metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"__metadata__ is {quote(value)}, expected an object of strings")
    return value


def _range_problems(tensors: Sequence[TensorInfo], data_start: int, file_bytes: int) -> Iterable[str]:
    """Holes, overlaps and a wrong end; ``tensors`` in offset order."""
    end = data_start
    for info in tensors:
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            yield (
                f"tensor {quote(info.name)} starts at byte {info.start - data_start} of the data, "
                f"expected {end - data_start}: it {kind}"
            )
        end = max(end, info.end)
    if end > file_bytes:
        yield (
            f"truncated: the header describes {end:,} bytes, the file has {file_bytes:,}; "
            "download or copy it again"
        )
    elif end < file_bytes:
        yield (
            f"{file_bytes - end:,} trailing bytes after the last tensor (the header describes {end:,} bytes, "
            f"the file has {file_bytes:,}); download or copy it again"
        )


def parse_header(file: str, header: bytes, file_bytes: int, problems: list[str]) -> Shard | None:
    """The shard that a header describes, or None with every fault appended to ``problems``.

    ``header`` excludes the 8-byte length; ``file_bytes`` is the size of the whole file.
    """
    try:
        count = header.count(b"{")
        if count > MAX_TENSORS:
            raise ValueError(f"it describes {count:,} tensors, expected at most {MAX_TENSORS:,}")
        # Without its padding, which may be all but a few bytes of it.
        described = loads_strict(header.rstrip(b" "), _VALUES_OF_METADATA + count * _VALUES_PER_TENSOR)
        if not isinstance(described, dict):
            raise ValueError(f"holds {quote(described)}, expected a JSON object")
        metadata = _parse_metadata(described.pop("__metadata__", None))
    except ValueError as error:
        problems.append(f"{file}: header is damaged: {error}; download it again")
        return None
    data_start = LENGTH_BYTES + len(header)
    tensors, faults = [], []
    for name, entry in described.items():
        try:
            tensors.append(_parse_entry(name, entry, file, data_start))
        except ValueError as error:
            faults.append(f"{file}: tensor {quote(name)}: {error}")
            if len(faults) == _MAX_FAULTS:
                faults.insert(
                    0,
                    f"{file}: header is damaged: {_MAX_FAULTS:,} tensors or more are wrong; download it again",
                )
                break
    tensors.sort(key=lambda info: (info.start, info.end))
    if not faults:  # with a tensor left out, every range after it would look wrong
        wrong = itertools.islice(_range_problems(tensors, data_start, file_bytes), _MAX_FAULTS)
        faults.extend(f"{file}: {text}" for text in wrong)
    problems.extend(faults)
    return None if faults else Shard(file, metadata, tuple(tensors), header)


def new_shard(
    file: str, tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None
) -> Shard:
    """A shard laid out as the safetensors library does it: wider dtypes first, then by name.

    ``tensors`` are (name, dtype, shape). Raises ValueError for a repeated or reserved name or a bad dtype.
    """
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda item: (-_RANK_OF.get(item[1], 0), item[0])):
        if name in entries or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is {'repeated' if name in entries else 'reserved'}")
        start, end = end, end + element_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    described = ({} if metadata is None else {"__metadata__": dict(metadata)}) | entries
    header = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: header of {len(header):,} bytes, at most {MAX_HEADER_BYTES:,} are allowed")
    problems: list[str] = []
    shard = parse_header(file, header, LENGTH_BYTES + len(header) + end, problems)
    if shard is None:
        raise ValueError("; ".join(problems))
    return shard
