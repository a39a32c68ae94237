"""Arrays of random bits, safetensors files of any content, and what folders hold."""

import json
import struct
from pathlib import Path

import numpy as np

from jaxmoe.interop.storage.format import INDEX_FILE, dtype_name


def random_array(rng, shape, dtype="float32"):
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return (raw[..., 0] & 1).astype(bool) if dtype.kind == "b" else raw.view(dtype).reshape(shape)


def same(actual, expected):
    """Equality of bits, so that NaNs count as equal and dtypes as different."""
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()
    )


def write_raw(path, header, data=b"", length=None):
    """A file with any header (an object, or bytes) and any announced length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def described(arrays):
    return [(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def open_files(path):
    links = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return sum(link.is_relative_to(path) for link in links)
