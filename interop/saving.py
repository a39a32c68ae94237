"""Exporting: parameters → a Hugging Face folder that follows the one they came from.

Key names, dtypes, shard split, headers, index, config.json and every other file are the source's; `export_plan` has
the exceptions. A number that training did not change is written with the source's own bits, so an untouched tensor is
byte-identical whatever dtype it was trained in.

Of a quantised folder the tensors are written in bfloat16 and config.json without ``quantization_config``, or on request
in the source's own format again.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.interop.export_plan import (
    exported_config,
    exported_shards,
    refuse_overlap,
    rewritten_files,
    side_files,
    source_files,
)
from jaxmoe.interop.loading import numpy_dtype
from jaxmoe.interop.quantization.folder import Files, QuantizedFolder
from jaxmoe.interop.quantization.stored_order import StoredOrder
from jaxmoe.interop.rules import Binding, Bindings
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.format import INDEX_FILE, Shard, TensorInfo, dtype_name
from jaxmoe.interop.storage.slices import Box, pieces
from jaxmoe.interop.storage.writer import FolderWriter, index_json, plan_shards
from jaxmoe.parallel.slicing import slice_bits
from jaxmoe.params import Tree, named

PIECE_BYTES = 8 << 20
"""A tensor is fetched, compared and written in pieces of at most this size."""

MAX_SHARD_BYTES = 5 * 10**9
"""Largest file of an export that has no source folder to follow."""


def write_folder(
    params: Tree,
    source: Source,
    folder: str | Path,
    *,
    dtype: Any,
    replaced_files: Mapping[str, Path | None] | None = None,
    overwrite: bool = False,
    quantization: str = "none",
) -> list[str]:
    """Write `params` as a Hugging Face folder: as `source` is laid out, or as a new one where it has no folder.

    Args:
        params: the tree of `ModelSpec.declared`.
        source: where the model comes from.
        folder: a new folder, or with `overwrite` an existing checkpoint that is replaced as a whole.
        dtype: of every tensor of a new folder but those kept in float32.
        replaced_files, overwrite, quantization: as in `export_like_source`.

    Returns:
        Files of the source that were left out (`jaxmoe.interop.export_plan.LEFT_OUT`).

    Raises:
        UserError: as `export_like_source`, or the source's format is asked for and there is none.
    """
    if source.folder is not None:
        return export_like_source(
            params,
            source,
            folder,
            replaced_files=replaced_files,
            overwrite=overwrite,
            quantization=quantization,
        )
    if quantization != "none":
        raise UserError(
            f"quantization {quantization!r}: the model was not loaded from a folder whose format it could have; "
            "expected 'none'"
        )
    present = {name: path for name, path in (replaced_files or {}).items() if path is not None}
    export_new(params, source, folder, dtype=dtype, extra_files=present, overwrite=overwrite)
    return []


def export_like_source(
    params: Tree,
    source: Source,
    folder: str | Path,
    *,
    replaced_files: Mapping[str, Path | None] | None = None,
    overwrite: bool = False,
    quantization: str = "none",
) -> list[str]:
    """Write `params` as `source` is laid out.

    In several processes all must call it; the first one writes.

    Args:
        params: the tree of `ModelSpec.declared`.
        source: the checkpoint that they were loaded from; its folder must still be there.
        folder: a new folder, or with `overwrite` an existing checkpoint that is replaced as a whole.
        replaced_files: files that take the place of the source's of those names, such as another tokenizer's;
            None leaves a file out.
        quantization: "none", or "source": tensors that the source has quantised are written in its format. Blocks
            that training did not change, in bfloat16, repeat the source's bytes; the others are quantised anew.

    Returns:
        Files of the source that were left out (`jaxmoe.interop.export_plan.LEFT_OUT`).

    Raises:
        UserError: the folder is not empty, the disk is full, or a value does not fit the tensor's dtype.
    """
    origin, files = source.opened
    shards = exported_shards(source, quantization)
    tensors = (
        _QuantizedTensors(params, source.bindings, files)
        if isinstance(files, QuantizedFolder) and quantization == "source"
        else _Tensors(params, source.bindings, files)
    )
    refuse_overlap(origin, Path(folder))
    if jax.process_index() != 0:
        tensors.take_part(shards)
        return []
    with tensors.kept_company(shards), FolderWriter(folder, overwrite=overwrite) as writer:
        for shard in shards:
            writer.shard(shard, tensors.fetch)
        rewritten = rewritten_files(source, shards, quantization)
        for name, data in rewritten.items():
            writer.file(name, data)
        known = source_files(source, quantization) | rewritten.keys() | (replaced_files or {}).keys()
        copied, left_out = side_files(origin, known)
        for name in copied:
            writer.copy(origin / name, name)
        for name, replacement in (replaced_files or {}).items():
            if replacement is not None:
                writer.copy(replacement, name)
    return left_out


def export_new(
    params: Tree,
    source: Source,
    folder: str | Path,
    *,
    dtype: Any,
    extra_files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model that was not loaded from a folder, in the first layout that its family's rules give.

    Args:
        params: the tree of `ModelSpec.declared`.
        source: the model; the dtype field of its config.json is set to `dtype`.
        folder: as in `export_like_source`.
        dtype: of every tensor but those kept in float32.
        extra_files: further files by name in the folder, such as a tokenizer.
        max_shard_bytes: a file is closed before it grows past this.
    """
    bindings = source.bindings.of_tensor.values()
    stored = [(b.source, dtype_name(b.declared.dtype(dtype)), b.shape) for b in bindings]
    stored += [(name, dtype_name(array.dtype), array.shape) for name, array in source.beside.items()]
    shards = plan_shards(stored, max_shard_bytes)
    tensors = _Tensors(params, source.bindings, None, source.beside)
    if jax.process_index() != 0:
        tensors.take_part(shards)
        return
    config = {name: value for name, value in exported_config(source).items() if name != "torch_dtype"} | {
        "dtype": np.dtype(dtype).name
    }
    with tensors.kept_company(shards), FolderWriter(folder, overwrite=overwrite) as writer:
        for shard in shards:
            writer.shard(shard, tensors.fetch)
        if len(shards) > 1:
            writer.file(INDEX_FILE, index_json(shards))
        writer.file("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        for name, path in (extra_files or {}).items():
            writer.copy(path, name)


class _Tensors:
    """Fetches tensors of the export from the devices, piece by piece."""

    def __init__(
        self,
        params: Tree,
        bindings: Bindings,
        original: Files | None,
        beside: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._params = dict(named(params))
        self._beside = beside or {}
        self._bindings = bindings
        self._original = original
        self._slices = 0
        self._to_skip = 0

    def take_part(self, shards: Sequence[Shard]) -> None:
        """Run the same device computations as the process that writes, and drop the results."""
        for info in (info for shard in shards for info in shard.tensors):
            for bits in self._computed(info):
                if bits is not None:
                    bits.block_until_ready()

    @contextlib.contextmanager
    def kept_company(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Where writing `shards` fails, do the rest of `take_part`, which other processes are in, before it is told."""
        try:
            yield
        except Exception:
            if jax.process_count() > 1:
                self._to_skip = self._slices
                self.take_part(shards)
            raise

    def _slice(self, array: jax.Array, box: Sequence[slice]) -> Any:
        """`slice_bits`, or None for what was computed before."""
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._slices += 1
        return slice_bits(array, box)

    def _computed(self, info: TensorInfo) -> Iterator[Any]:
        """What the devices compute for `fetch`, in the same order."""
        if info.name in self._bindings.of_tensor:
            yield from (bits for _, bits in self._pieces(self._bindings.of_tensor[info.name]))

    def fetch(self, info: TensorInfo) -> Iterator[memoryview | bytearray]:
        """The bytes of one tensor, in order."""
        binding = self._bindings.of_tensor.get(info.name)
        if info.name in self._beside:
            yield np.ascontiguousarray(self._beside[info.name]).reshape(-1).view(np.uint8).data
            return
        if binding is None:  # not the model's: copied as it is
            assert self._original is not None
            yield from self._original.iter_bytes(info.name)
            return
        free = [i for i, letter in enumerate(binding.declared.dims) if letter not in binding.index]
        original = self._repeated(info)
        for box, bits in self._pieces(binding):
            part = np.asarray(bits).view(self._params[binding.target].dtype)
            values = self._stored(original, binding, box, part.reshape([bits.shape[i] for i in free]))
            if original is not info:
                values = _cast(info, values)
            yield np.ascontiguousarray(binding.to_tensor(values)).reshape(-1).view(np.uint8).data

    def _repeated(self, info: TensorInfo) -> TensorInfo:
        """The tensor whose values a copy repeats, in its own dtype; any other tensor itself."""
        original = self._bindings.copies.get(info.name)
        there = {} if self._original is None else self._original.tensors
        return there.get(original, info) if original is not None else info

    def _pieces(self, binding: Binding) -> Iterator[tuple[Box, Any]]:
        """Pieces of a tensor in order: the box on the tensor's letters, and the bits in the parameter's."""
        array = self._params[binding.target]
        whole = [slice(0, size) for size in binding.sizes]
        for box in pieces(whole, max(1, PIECE_BYTES // array.dtype.itemsize)):
            of_letter = binding.within(box)
            yield box, self._slice(array, [of_letter[letter] for letter in binding.declared.dims])

    def _stored(self, info: TensorInfo, binding: Binding, box: Box, part: np.ndarray) -> np.ndarray:
        """A piece, its axes the parameter's, in the dtype of the file; the source's bits where nothing changed."""
        same: np.ndarray | None = None
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
            values = part.astype(numpy_dtype(info.dtype))
            if self._original is not None:
                before = binding.to_parameter(self._original.read_box(info.name, binding.sizes, box))
                bits = np.dtype(f"u{part.dtype.itemsize}")
                same = before.astype(part.dtype).view(bits) == np.ascontiguousarray(part).view(bits)
                np.copyto(values, before, where=same)
        _refuse_not_finite(info, part, values, same)
        return values


def _cast(info: TensorInfo, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(numpy_dtype(info.dtype))
    _refuse_not_finite(info, values, cast)
    return cast


def _refuse_not_finite(
    info: TensorInfo, values: np.ndarray, cast: np.ndarray, allowed: np.ndarray | None = None
) -> None:
    """Raise UserError where nan or infinity would be written; `allowed`: where the source has it."""
    lost = ~np.isfinite(cast)
    if allowed is not None:
        lost &= ~allowed
    if not lost.any():
        return
    finite = np.isfinite(values[lost])
    if not finite.all():
        raise UserError(
            f"tensor {info.name}: found nan or infinity, expected finite values: the training diverged; export an "
            "earlier checkpoint"
        )
    largest = np.abs(values[lost].astype(np.float64)).max()
    raise UserError(
        f"tensor {info.name}: value {largest:.6g} does not fit its dtype {info.dtype} in the file"
    )


class _QuantizedTensors(_Tensors):
    """Fetches the tensors of a quantised folder as they are stored, codes and scales.

    Codes depend on their scales, which may lie in another file: all are made whenever one of them is written.
    """

    def __init__(self, params: Tree, bindings: Bindings, files: QuantizedFolder) -> None:
        super().__init__(params, bindings, files.stored)
        self._files = files

    def fetch(self, info: TensorInfo) -> Iterator[memoryview | bytearray]:
        """The bytes of one stored tensor, in order."""
        stored = self._quantized(info)
        if stored is None:
            yield from super().fetch(info)
            return
        dtype = self._params[stored.binding.target].dtype
        for band, parts in self._bands(stored):
            rows = [stored.rows(np.asarray(bits).view(dtype)) for bits in parts]
            made = self._files.requantize(stored.tensor, band, np.concatenate(rows))[info.name]
            yield np.ascontiguousarray(made).reshape(-1).view(np.uint8).data

    def _computed(self, info: TensorInfo) -> Iterator[Any]:
        stored = self._quantized(info)
        if stored is None:
            yield from super()._computed(info)
        else:
            yield from (bits for _, parts in self._bands(stored) for bits in parts)

    def _quantized(self, info: TensorInfo) -> StoredOrder | None:
        """The quantised tensor of the model's that a stored tensor is a part of."""
        tensor = self._files.part_of(info.name)
        binding = None if tensor is None else self._bindings.of_tensor.get(tensor.name)
        return None if tensor is None or binding is None else StoredOrder(tensor, binding)

    def _bands(self, stored: StoredOrder) -> Iterator[tuple[Box, list[Any]]]:
        """Bands of a tensor in order, and the bits of the parts that each is made of."""
        array = self._params[stored.binding.target]
        for band in self._files.bands(stored.tensor, PIECE_BYTES // array.dtype.itemsize):
            yield (
                band,
                [
                    self._slice(array, [part[letter] for letter in stored.binding.declared.dims])
                    for part in stored.parts(band)
                ],
            )
