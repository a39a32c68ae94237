"""Exporting: parameters → a Hugging Face folder that follows the one they came from.

Key names, dtypes, shard split, headers, index, config.json and every other file are the source's. A number
that training did not change is written with the source's own bits, so an untouched tensor is byte-identical
whatever dtype it was trained in.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.errors import UserError
from jaxmoe.interop.checkpoint import Source, numpy_dtype
from jaxmoe.interop.layout import INDEX_FILE, Shard, TensorInfo, dtype_name
from jaxmoe.interop.reader import CheckpointFolder
from jaxmoe.interop.rules import Binding, Bindings
from jaxmoe.interop.writer import FolderWriter, index_json, plan_shards
from jaxmoe.params import Tree, named

PIECE_BYTES = 32 << 20
"""A tensor is fetched, compared and written in pieces of about this size."""

MAX_SHARD_BYTES = 5 * 10**9
"""Largest file of an export that has no source folder to follow."""

_OTHER_WEIGHTS = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".npz",
        ".pkl",
    }
)
"""Suffixes of weight files: copies of the weights before training would contradict the ones exported."""


def export_like_source(
    params: Tree,
    source: Source,
    folder: str | Path,
    *,
    replaced_files: Mapping[str, Path | None] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write `params` as `source` is laid out.

    On several hosts all must call it; the first one writes.

    Args:
        params: the tree of `jaxmoe.spec.model_params`.
        source: the checkpoint that they were loaded from; its folder must still be there.
        folder: a new folder, or with `overwrite` an existing checkpoint that is replaced as a whole.
        replaced_files: files that take the place of the source's of those names, such as another tokenizer's;
            None leaves a file out.

    Returns:
        Files of the source that were left out: weights in other formats.

    Raises:
        UserError: the folder is not empty, the disk is full, or a value does not fit the tensor's dtype.
    """
    tensors = _Tensors(params, source.bindings, source.files)
    if source.folder.resolve() == Path(folder).resolve():
        raise UserError(f"{folder}: is the folder that the model was loaded from; export to another one")
    if Path(folder).resolve().is_relative_to(source.folder.resolve()):
        raise UserError(
            f"{folder}: lies inside {source.folder}, all of which is exported; choose a folder outside of it"
        )
    if jax.process_index() != 0:
        tensors.take_part(source.files.shards)
        return []
    left_out = []
    with FolderWriter(folder, overwrite=overwrite) as writer:
        for shard in source.files.shards:
            writer.shard(shard, tensors.fetch)
        written = {shard.file for shard in source.files.shards} | (replaced_files or {}).keys()
        for path in sorted(source.folder.rglob("*")):
            name = path.relative_to(source.folder).as_posix()
            if not path.is_file() or name in written or name.startswith((".cache/", ".git/")):
                continue
            if path.suffix in _OTHER_WEIGHTS:
                left_out.append(name)
            else:
                writer.copy(path, name)
        for name, replacement in (replaced_files or {}).items():
            if replacement is not None:
                writer.copy(replacement, name)
    return left_out


def export_new(
    params: Tree,
    bindings: Bindings,
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    dtype: Any,
    extra_files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model that was not loaded from a folder, in the first layout that its family's rules give.

    Args:
        params: the tree of `jaxmoe.spec.model_params`.
        bindings: of the family's rules to the model.
        config: the config.json; its dtype field is set to `dtype`.
        folder: as in `export_like_source`.
        dtype: of every tensor.
        extra_files: further files by name in the folder, such as a tokenizer.
        max_shard_bytes: a file is closed before it grows past this.
    """
    stored = dtype_name(dtype)
    shards = plan_shards([(b.source, stored, b.shape) for b in bindings.of_tensor.values()], max_shard_bytes)
    tensors = _Tensors(params, bindings, None)
    if jax.process_index() != 0:
        tensors.take_part(shards)
        return
    config = {name: value for name, value in config.items() if name != "torch_dtype"} | {
        "dtype": np.dtype(dtype).name
    }
    with FolderWriter(folder, overwrite=overwrite) as writer:
        for shard in shards:
            writer.shard(shard, tensors.fetch)
        if len(shards) > 1:
            writer.file(INDEX_FILE, index_json(shards))
        writer.file("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        for name, path in (extra_files or {}).items():
            writer.copy(path, name)


class _Tensors:
    """Fetches tensors of the export from the devices, piece by piece."""

    def __init__(self, params: Tree, bindings: Bindings, original: CheckpointFolder | None) -> None:
        self._params = dict(named(params))
        self._bindings = bindings
        self._original = original

    def take_part(self, shards: Sequence[Shard]) -> None:
        """Run the same device computations as the host that writes, and drop the results."""
        for info in (info for shard in shards for info in shard.tensors):
            if info.name in self._bindings.of_tensor:
                for _ in self._parts(self._bindings.of_tensor[info.name]):
                    pass

    def fetch(self, info: TensorInfo) -> Iterator[memoryview | bytearray]:
        """The bytes of one tensor, in order."""
        binding = self._bindings.of_tensor.get(info.name)
        if binding is None:  # not the model's: copied as it is
            assert self._original is not None
            yield from self._original.iter_bytes(info.name)
            return
        for box, part in self._parts(binding):
            values = self._stored(info, binding, box, part)
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def _parts(self, binding: Binding) -> Iterator[tuple[list[slice], np.ndarray]]:
        """Pieces of a tensor along its outermost letter: the box on the tensor's letters, and the values."""
        array = self._params[binding.target]
        outer, length = binding.letters[0], binding.sizes[0]
        step = max(1, PIECE_BYTES * length // max(1, math.prod(binding.sizes) * array.dtype.itemsize))
        for start in range(0, length, step):
            stop = min(start + step, length)
            box = [slice(start, stop), *(slice(0, size) for size in binding.sizes[1:])]
            starts, sizes = [], []
            for letter, size in zip(binding.declared.dims, binding.declared.shape, strict=True):
                fixed = letter in binding.index
                starts.append(binding.index[letter] if fixed else start if letter == outer else 0)
                sizes.append(1 if fixed else stop - start if letter == outer else size)
            part = np.asarray(_slice(array, np.asarray(starts, np.int32), tuple(sizes), _replicated(array)))
            free = [i for i, letter in enumerate(binding.declared.dims) if letter in binding.index]
            yield box, part.squeeze(tuple(free))

    def _stored(self, info: TensorInfo, binding: Binding, box: list[slice], part: np.ndarray) -> np.ndarray:
        """A piece in the dtype of the file; where training changed nothing, the very bits of the source."""
        with np.errstate(over="ignore", invalid="ignore"):  # a NaN stays one; what overflows is found below
            values = part.astype(numpy_dtype(info.dtype))
            if self._original is not None:
                before = binding.to_parameter(self._original.read_box(info.name, binding.sizes, box))
                bits = np.dtype(f"u{part.dtype.itemsize}")
                same = before.astype(part.dtype).view(bits) == np.ascontiguousarray(part).view(bits)
                np.copyto(values, before, where=same)
        lost = np.isfinite(part) & ~np.isfinite(values)
        if lost.any():
            largest = np.abs(part[lost].astype(np.float64)).max()
            raise UserError(
                f"tensor {info.name}: value {largest:.6g} does not fit its dtype {info.dtype} in the file"
            )
        return binding.to_tensor(values)


def _replicated(array: jax.Array) -> NamedSharding | None:
    if isinstance(array.sharding, NamedSharding):
        return NamedSharding(array.sharding.mesh, PartitionSpec())
    return None


@functools.partial(jax.jit, static_argnames=("sizes", "sharding"))
def _slice(
    array: jax.Array, starts: np.ndarray, sizes: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """A slice of a sharded array, whole on every device, so that any host can fetch it."""
    piece = jax.lax.dynamic_slice(array, [starts[i] for i in range(len(sizes))], sizes)
    return piece if sharding is None else jax.lax.with_sharding_constraint(piece, sharding)
