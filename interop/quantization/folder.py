"""Quantised checkpoint folders, seen as if they were stored in bfloat16, and written again as they are stored.

config.json says how a folder is quantised. A `QuantizedFolder` presents the pairs of codes and scales in it as ordinary
tensors, so that conversion rules, sharded loading and export need not know.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.block_format import BF16, Format, Pair, per_block, per_element
from jaxmoe.interop.quantization.block_fp8 import BlockFP8
from jaxmoe.interop.quantization.mxfp4 import MXFP4
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.storage.format import Shard, dtype_name, new_shard
from jaxmoe.interop.storage.reader import BUFFER_BYTES, CheckpointFolder
from jaxmoe.interop.storage.slices import Box, pieces, runs

FIELD = "quantization_config"
_FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Format]] = {
    "fp8": BlockFP8.from_config,
    "mxfp4": MXFP4.from_config,
}


def split_config(raw: Mapping[str, Any], file: str) -> tuple[dict[str, Any], Format | None]:
    """A config.json without its ``quantization_config``, and the format that this describes, if any.

    Args:
        raw: the config.json.
        file: what to call it in error messages.

    Raises:
        UserError: a method, or a choice of it, that is not supported.
    """
    plain = {name: value for name, value in raw.items() if name != FIELD}
    given = raw.get(FIELD)
    if given is None:
        return plain, None
    where = f"{file}: {FIELD}"
    if not isinstance(given, dict):
        raise UserError(f"{where} = {quote(given)}: expected an object with a quant_method")
    method = given.get("quant_method")
    if method not in list(_FORMATS):
        raise UserError(
            f"{where}.quant_method = {quote(method)} is not supported; supported: {', '.join(_FORMATS)}. "
            "Convert the checkpoint to bfloat16"
        )
    return plain, _FORMATS[method](given, where)


class QuantizedFolder:
    """A quantised folder that reads like a `CheckpointFolder` in which nothing is quantised.

    Attributes:
        stored: the folder as it is.
        pairs: quantised tensors by their names without quantisation.
        shards: the same files without quantisation, where they would hold anything.
        tensors: what is in those, by name. Their places in a file are those of `shards`.
    """

    def __init__(self, stored: CheckpointFolder, format: Format, problems: list[str]) -> None:
        """Pair up the tensors of a folder; what is damaged is appended to `problems`."""
        self.stored = stored
        self._format = format
        pairs, self._hidden = format.find(stored.tensors, problems)
        self.pairs: Mapping[str, Pair] = {pair.name: pair for pair in pairs}
        self._pair_of = {name: pair for pair in pairs for name in (pair.codes, pair.scales)}
        self.shards = tuple(shard for shard in map(self._unquantized, stored.shards) if shard.tensors)
        self.tensors = {info.name: info for shard in self.shards for info in shard.tensors}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self.stored.bytes_read

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """See `CheckpointFolder.read_box`."""
        if name in self.pairs:
            return self._format.read(self.stored, self.pairs[name], sizes, box)
        return self.stored.read_box(name, sizes, box)

    def iter_bytes(self, name: str, chunk: int = BUFFER_BYTES) -> Iterator[bytearray]:
        """See `CheckpointFolder.iter_bytes`."""
        return (
            self._chunks(self.pairs[name], chunk)
            if name in self.pairs
            else self.stored.iter_bytes(name, chunk)
        )

    def _chunks(self, pair: Pair, chunk: int) -> Iterator[bytearray]:
        whole = [slice(0, size) for size in pair.shape]
        for box in pieces(whole, max(1, chunk // BF16.itemsize)):
            yield bytearray(self.read_box(pair.name, pair.shape, box).tobytes())

    def pair_of(self, name: str) -> Pair | None:
        """What a stored tensor has the codes or the scales of."""
        return self._pair_of.get(name)

    def bands(self, pair: Pair, elements: int) -> Iterator[Box]:
        """Cut a quantised tensor into runs of whole blocks of rows, on its axes as they are stored.

        They have at most `elements` elements, or one row of blocks.
        """
        *lead, rows, columns = pair.stored_shape
        height = self._format.block[0]
        height *= max(1, elements // (height * columns))
        for matrix in np.ndindex(*lead):
            for start in range(0, rows, height):
                place = (slice(index, index + 1) for index in matrix)
                yield (*place, slice(start, min(start + height, rows)), slice(0, columns))

    def requantize(self, pair: Pair, band: Box, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a band: the source's own for every block whose values are the source's in bfloat16.

        Args:
            pair: the tensor.
            band: one of its `bands`.
            values: its values, (rows, columns).

        Raises:
            UserError: a value that changed is not finite.
        """
        codes, scales = self._stored_band(pair, band)
        box = tuple(band[pair.order.index(axis)] for axis in range(len(band)))
        before = self.read_box(pair.name, pair.shape, box).transpose(pair.order).reshape(values.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            # By way of the dtype of training, which may have rounded what was read.
            was, now = (array.astype(BF16).view(np.uint16) for array in (before.astype(values.dtype), values))
        changed = per_block(np.logical_or, was != now, self._format.block)
        if not changed.any():
            return codes, scales
        here = per_element(changed, self._format.block, values.shape)
        if not np.isfinite(values[here]).all():
            raise UserError(
                f"tensor {pair.name}: a value that is not finite has no place in blocks; export without quantization"
            )
        numbers = np.where(here, values, 0).astype(np.float32)
        new_codes, new_scales = self._format.encode(numbers, scales.dtype)
        flat = codes.reshape(len(values), -1)
        width = self._format.block[1] * flat.shape[1] // values.shape[1]  # of a block, in elements of `codes`
        mask = per_element(changed, (self._format.block[0], width), flat.shape).reshape(codes.shape)
        return np.where(mask, new_codes, codes), np.where(changed, new_scales, scales)

    def _stored_band(self, pair: Pair, band: Box) -> tuple[np.ndarray, np.ndarray]:
        *lead, rows, _ = band
        height = self._format.block[0]
        blocks = slice(rows.start // height, -(-rows.stop // height))
        read = []
        for name, part in ((pair.codes, rows), (pair.scales, blocks)):
            shape = self.stored.tensors[name].shape
            box = (*lead, part, *(slice(0, size) for size in shape[len(lead) + 1 :]))
            read.append(self.stored.read_box(name, shape, box).reshape(-1, *shape[len(lead) + 1 :]))
        return read[0], read[1]

    def _unquantized(self, shard: Shard) -> Shard:
        if not any(info.name in self._hidden for info in shard.tensors):
            return shard
        there: list[tuple[str, str, Sequence[int]]] = []
        for info in shard.tensors:
            pair = self._pair_of.get(info.name)
            if info.name not in self._hidden:
                there.append((info.name, info.dtype, info.shape))
            elif pair is not None and info.name == pair.codes:
                there.append((pair.name, dtype_name(BF16), pair.shape))
        return new_shard(shard.file, there, shard.metadata)


Files = CheckpointFolder | QuantizedFolder


def open_files(folder: Path, format: Format | None, problems: list[str]) -> Files:
    """The safetensors files of a folder; of a quantised one, what is damaged is appended to `problems`.

    Raises:
        UserError: the index or a header is damaged.
    """
    stored = CheckpointFolder(folder)
    return stored if format is None else QuantizedFolder(stored, format, problems)


@dataclasses.dataclass(frozen=True)
class StoredOrder:
    """The letters of a quantised tensor's binding in the order in which it is stored."""

    pair: Pair
    binding: Binding

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each stored axis."""
        return tuple(self.binding.axes[axis] for axis in self.pair.order)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.pair.stored_shape[-1]

    def parts(self, band: Box) -> Iterator[dict[str, slice]]:
        """Parts of the parameter, a slice per letter, whose rows follow each other in `band`.

        Rows may be several letters fused, of which a band begins and ends anywhere.
        """
        size_of = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        boxes: list[Box] = [()]
        for letters, part in zip(self.axes, band, strict=True):
            finer = list(runs([size_of[letter] for letter in letters], part.start, part.stop))
            boxes = [(*box, *more) for box in boxes for more in finer]
        order = [letter for group in self.axes for letter in group]
        for box in boxes:
            of_letter = dict(zip(order, box, strict=True))
            yield self.binding.within([of_letter[letter] for letter in self.binding.letters])

    def rows(self, part: np.ndarray) -> np.ndarray:
        """A part in the parameter's own order of the letters → (rows, columns)."""
        dims = self.binding.declared.dims
        order = [dims.index(letter) for group in self.axes for letter in group]
        fixed = [dims.index(letter) for letter in self.binding.index]  # of length 1
        return part.transpose([*fixed, *order]).reshape(-1, self.columns)
