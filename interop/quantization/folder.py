"""Quantised checkpoint folders, seen as if they were not, and written again as they are stored.

A `QuantizedFolder` presents each quantised tensor in it as one ordinary tensor, so that conversion rules, sharded
loading and export need not know.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.interop.quantization.arithmetic import Blocks
from jaxmoe.interop.quantization.parts import (
    Axis,
    begun,
    nested_scales,
    numbers,
    pack,
    places,
    read_words,
    spread,
)
from jaxmoe.interop.quantization.stored_form import BF16, ROWS, Format, Part, QuantizedTensor
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.storage.format import Shard, dtype_name, new_shard
from jaxmoe.interop.storage.reader import BUFFER_BYTES, CheckpointFolder
from jaxmoe.interop.storage.slices import Box, finer_axes, pieces, runs

TABLE_TOLERANCE = 1e-6
"""By which a table of values that a folder repeats may differ from the format's own."""


class QuantizedFolder:
    """A quantised folder that reads like a `CheckpointFolder` in which nothing is quantised.

    Attributes:
        stored: the folder as it is.
        quantized: quantised tensors by their names without quantisation.
        shards: the same files without quantisation, where they would hold anything.
        tensors: what is in those, by name. Their places in a file are those of `shards`.
    """

    def __init__(self, stored: CheckpointFolder, format: Format, problems: list[str]) -> None:
        """Find the quantised tensors of a folder; what is damaged is appended to `problems`."""
        self.stored = stored
        damage: list[str] = []
        found, self._hidden = format.find(stored, damage)
        if not found and not damage:
            dtypes = sorted({info.dtype for info in stored.tensors.values()})
            damage.append(
                f"the config says that weights are quantised, but of {len(stored.tensors)} tensors none is: found "
                f"{', '.join(dtypes)}, expected {format.expected}; remove quantization_config, or "
                "hf_quant_config.json, if they were dequantised"
            )
        problems += damage
        self.quantized: Mapping[str, QuantizedTensor] = {tensor.name: tensor for tensor in found}
        self._part_of = {part.tensor: tensor for tensor in found for part in tensor.parts}
        self.shards = tuple(shard for shard in map(self._unquantized, stored.shards) if shard.tensors)
        self.tensors = {info.name: info for shard in self.shards for info in shard.tensors}
        self._last: tuple[Any, list[Axis], list[np.ndarray]] | None = None

    @property
    def dtype(self) -> str:
        """Name of the dtype of all quantised tensors, "bfloat16" where they differ."""
        dtypes = {tensor.dtype for tensor in self.quantized.values()}
        return (dtypes.pop() if len(dtypes) == 1 else BF16).name

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self.stored.bytes_read

    def read_box(self, name: str, sizes: Sequence[int], box: Sequence[slice]) -> np.ndarray:
        """See `CheckpointFolder.read_box`."""
        if name not in self.quantized:
            return self.stored.read_box(name, sizes, box)
        tensor = self.quantized[name]
        lengths = _lengths(sizes, box)
        if 0 in lengths:
            return np.empty(lengths, tensor.dtype)
        wanted = self._grouped(tensor, _wanted(tensor, sizes, box))
        held, words = self._checked_words(tensor, wanted)
        return _arranged(tensor, sizes, box, self._values(tensor, words, held, wanted))

    def read_packed(
        self, name: str, sizes: Sequence[int], box: Sequence[slice], blocks: Sequence[slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a part of a quantised tensor that has no zero points.

        Args:
            name: of the tensor without quantisation.
            sizes, box: see `CheckpointFolder.read_box`.
            blocks: `box` with every element left out whose scale an element before it has.

        Returns:
            The codes, uint8, and the scales of what is in `blocks`: as they are stored, those that are quantised
            themselves in float32.
        """
        tensor = self.quantized[name]
        wanted = _wanted(tensor, sizes, box)
        fewer = [
            whole if whole.box == part.box else part
            for whole, part in zip(wanted, _wanted(tensor, sizes, blocks), strict=True)
        ]
        held, words = self._checked_words(tensor, wanted)
        codes = numbers(tensor.codes, words[tensor.codes], held, wanted).view(np.uint8)
        found = {
            part: numbers(part, words[part], held, fewer) for part in tensor.parts if part != tensor.codes
        }
        scales = spread(tensor.scales, self._wide(tensor, found, fewer)[tensor.scales], fewer)
        scales = np.broadcast_to(scales, [len(axis.at) for axis in fewer])
        return _arranged(tensor, sizes, box, codes), _arranged(tensor, sizes, blocks, scales)

    def _checked_words(
        self, tensor: QuantizedTensor, wanted: Sequence[Axis]
    ) -> tuple[Sequence[Axis], dict[Part, np.ndarray]]:
        self._check_shape(tensor)
        self._check_table(tensor)
        held, words = self._words(tensor, wanted)
        return held, dict(zip(tensor.parts, words, strict=True))

    def _values(
        self,
        tensor: QuantizedTensor,
        words: Mapping[Part, np.ndarray],
        held: Sequence[Axis],
        wanted: Sequence[Axis],
    ) -> np.ndarray:
        """What is wanted of a tensor on its axes as they are stored."""
        found = {part: numbers(part, one, held, wanted) for part, one in words.items()}
        return _decode(tensor, self._wide(tensor, found, wanted), wanted)

    def _wide(
        self, tensor: QuantizedTensor, found: dict[Part, np.ndarray], wanted: Sequence[Axis]
    ) -> dict[Part, np.ndarray]:
        """What was found of a tensor, with scales in float32 where they are quantised."""
        if tensor.nested is None:
            return found
        codes, nested = found[tensor.scales], tensor.nested
        factors = nested_scales(tensor.scales, codes, nested.part, found[nested.part], wanted)
        return found | {tensor.scales: self.stored.read(nested.table)[codes] * factors + nested.offset}

    def _words(
        self, tensor: QuantizedTensor, wanted: Sequence[Axis]
    ) -> tuple[Sequence[Axis], list[np.ndarray]]:
        """The stored numbers of all parts that have what is wanted, and what else they have.

        Of a tensor that is stored transposed, stored rows are read whole: the tensor's order goes through all of them
        for each of their elements, so pieces in that order would read them again and again. Those of the last piece are
        kept until other ones are asked for.
        """
        if not tensor.transposed:
            return wanted, [read_words(self.stored, part, wanted) for part in tensor.parts]
        others = wanted[:-1]
        asked = tensor.name, [(axis.sizes, [(one.start, one.stop) for one in axis.box]) for axis in others]
        kept = self._last  # read once: another thread may replace it
        if kept is None or kept[0] != asked:
            held = self._grouped(tensor, [*others, wanted[-1].whole()])
            kept = asked, held, [read_words(self.stored, part, held) for part in tensor.parts]
            self._last = kept
        return [*others, kept[1][-1]], kept[2]

    def _grouped(self, tensor: QuantizedTensor, axes: Sequence[Axis]) -> list[Axis]:
        """The axes with the blocks that their indices are in, where a stored tensor says these."""
        axes, blocks = list(axes), self._blocks(tensor)
        if blocks is not None:
            axis = axes[tensor.groups_axis]
            axes[tensor.groups_axis] = dataclasses.replace(axis, blocks=blocks[axis.at])
        return axes

    def _blocks(self, tensor: QuantizedTensor) -> np.ndarray | None:
        """Which block each row or column is in; None where they follow each other."""
        if tensor.groups is None:
            return None
        length, step = tensor.stored_shape[tensor.groups_axis], tensor.scales.step[tensor.groups_axis]
        blocks = self.stored.read(tensor.groups).astype(np.int64)
        if (blocks == np.arange(length) // step).all():
            return None
        last = tensor.scales.stored(tensor.stored_shape)[tensor.groups_axis] - 1
        wrong = blocks[(blocks < 0) | (blocks > last)]
        if len(wrong):
            raise UserError(
                f"tensor {tensor.groups} has the group {wrong[0]}, expected 0 to {last}; download it again"
            )
        return blocks

    def _check_shape(self, tensor: QuantizedTensor) -> None:
        if tensor.declared is None:
            return
        says = tuple(self.stored.read(tensor.declared).ravel().tolist())
        if says != tensor.shape:
            raise UserError(
                f"tensor {tensor.declared} says {list(says)}, expected {list(tensor.shape)}: "
                f"{tensor.codes.tensor} and {tensor.scales.tensor} have that shape"
            )

    def _check_table(self, tensor: QuantizedTensor) -> None:
        if tensor.table is None:
            return
        says, expected = self.stored.read(tensor.table), tensor.arithmetic.values
        wrong = np.flatnonzero(~(np.abs(says - expected) <= TABLE_TOLERANCE))
        if len(wrong):
            code = wrong[0]
            raise UserError(
                f"tensor {tensor.table} gives code {code} the value {says[code]:.6g}, expected {expected[code]:.6g}; "
                "download it again, or convert the checkpoint to bfloat16"
            )

    def iter_bytes(self, name: str, chunk: int = BUFFER_BYTES) -> Iterator[bytearray]:
        """See `CheckpointFolder.iter_bytes`."""
        if name in self.quantized:
            return self._chunks(self.quantized[name], chunk)
        return self.stored.iter_bytes(name, chunk)

    def _chunks(self, tensor: QuantizedTensor, chunk: int) -> Iterator[bytearray]:
        whole = [slice(0, size) for size in tensor.shape]
        for box in pieces(whole, max(1, chunk // tensor.dtype.itemsize)):
            yield bytearray(self.read_box(tensor.name, tensor.shape, box).tobytes())

    def part_of(self, name: str) -> QuantizedTensor | None:
        """The quantised tensor that a stored tensor has codes or scales of."""
        return self._part_of.get(name)

    def bands(self, tensor: QuantizedTensor, elements: int) -> Iterator[Box]:
        """Cut a quantised tensor into runs of whole blocks of rows, on its axes as they are stored.

        They have at most `elements` elements, or as few rows as can be quantised apart.
        """
        *lead, rows, columns = tensor.stored_shape
        height = tensor.height
        if tensor.groups_axis == ROWS and self._blocks(tensor) is not None:
            height = rows
        height *= max(1, elements // (height * columns))
        for matrix in np.ndindex(*lead):
            for start in range(0, rows, height):
                place = (slice(index, index + 1) for index in matrix)
                yield (*place, slice(start, min(start + height, rows)), slice(0, columns))

    def requantize(self, tensor: QuantizedTensor, band: Box, values: np.ndarray) -> dict[str, np.ndarray]:
        """What is stored of a band: the source's own for every block whose values are the source's in its dtype.

        Args:
            tensor: the tensor.
            band: one of its `bands`.
            values: its values, (rows, columns).

        Returns:
            The numbers to store by the name of their tensor.

        Raises:
            UserError: a value that changed is not finite, too large for the dtype of the scales, or of a tensor that
                cannot be written in part.
        """
        shape = tensor.stored_shape
        axes = [Axis((size,), (part,), size) for size, part in zip(shape, band, strict=True)]
        axes = self._grouped(tensor, axes)
        words = {part: read_words(self.stored, part, axes) for part in tensor.parts}
        found = {part: numbers(part, one, axes, axes) for part, one in words.items()}
        before = _decode(tensor, self._wide(tensor, found, axes), axes).reshape(values.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            # By way of the dtype of training, which may have rounded what was read.
            was, now = (
                array.astype(tensor.dtype).view(f"u{tensor.dtype.itemsize}")
                for array in (before.astype(values.dtype), values)
            )
        if not (was != now).any():
            return {part.tensor: begun(part, one, axes) for part, one in words.items()}
        if tensor.repeats_only:
            raise UserError(
                f"tensor {tensor.name}: its values changed, and its scales are quantised or shared by several rows, so "
                "it cannot be written again in part; export without quantization"
            )
        made = _anew(tensor, found, axes, values, was != now)
        return {part.tensor: _stored(part, made[part], words[part]) for part in tensor.parts}

    def _unquantized(self, shard: Shard) -> Shard:
        if not any(info.name in self._hidden for info in shard.tensors):
            return shard
        there: list[tuple[str, str, Sequence[int]]] = []
        for info in shard.tensors:
            tensor = self._part_of.get(info.name)
            if info.name not in self._hidden:
                there.append((info.name, info.dtype, info.shape))
            elif tensor is not None and info.name == tensor.codes.tensor:
                there.append((tensor.name, dtype_name(tensor.dtype), tensor.shape))
        return new_shard(shard.file, there, shard.metadata)


def _lengths(sizes: Sequence[int], box: Sequence[slice]) -> list[int]:
    return [len(range(*part.indices(size))) for part, size in zip(box, sizes, strict=True)]


def _wanted(tensor: QuantizedTensor, sizes: Sequence[int], box: Sequence[slice]) -> list[Axis]:
    """A box of a tensor, seen with axes `sizes`, on its axes as they are stored."""
    finer = finer_axes(tensor.shape, sizes)
    return [
        Axis(
            tuple(sizes[i] for i in finer[logical]),
            tuple(box[i] for i in finer[logical]),
            tensor.shape[logical],
        )
        for logical in tensor.order
    ]


def _arranged(
    tensor: QuantizedTensor, sizes: Sequence[int], box: Sequence[slice], stored: np.ndarray
) -> np.ndarray:
    """What there is of a box on the axes as they are stored → on those of the box."""
    finer, lengths = finer_axes(tensor.shape, sizes), _lengths(sizes, box)
    order = [axis for logical in tensor.order for axis in finer[logical]]
    return stored.reshape([lengths[axis] for axis in order]).transpose(np.argsort(order))


def _decode(tensor: QuantizedTensor, found: Mapping[Part, np.ndarray], wanted: Sequence[Axis]) -> np.ndarray:
    """Codes and scales → the tensor's dtype."""
    values = tensor.arithmetic.values[found[tensor.codes].view(np.uint8)]
    if tensor.zeros is not None:
        values -= spread(tensor.zeros, found[tensor.zeros], wanted)
    factors = tensor.arithmetic.factors(found[tensor.scales])
    if tensor.whole is not None:
        factors = tensor.whole.applied(factors, found[tensor.whole.part])
    with np.errstate(over="ignore", invalid="ignore"):
        values *= spread(tensor.scales, factors, wanted)
        if tensor.unit is not None:
            values *= tensor.unit
        return values.astype(tensor.dtype)


def _anew(
    tensor: QuantizedTensor,
    found: Mapping[Part, np.ndarray],
    axes: Sequence[Axis],
    values: np.ndarray,
    different: np.ndarray,
) -> dict[Part, np.ndarray]:
    """Quantise the blocks anew that hold a number that is `different`; the others keep what was `found`."""
    scales = found[tensor.scales]
    *_, rows, columns = places(tensor.scales, axes)
    blocks = Blocks(rows, columns, (scales.shape[-2], scales.shape[-1]))
    changed = blocks.reduce(np.logical_or, different)
    here = blocks.spread(changed)
    _check_finite(tensor, values[here])
    made, given = dict(found), values
    if tensor.whole is not None:
        kept = found[tensor.whole.part]
        scale = made[tensor.whole.part] = tensor.whole.serving(kept, float(np.abs(values[here]).max()))
        if (scale != kept).any():  # the scales of all blocks go with it
            here, changed = np.full_like(here, True), np.full_like(changed, True)
            _check_finite(tensor, values)
        given = values / tensor.whole.applied(np.ones((), np.float32), scale).reshape(1, 1)
    fresh = tensor.arithmetic.encode(np.where(here, given, 0).astype(np.float32), blocks, scales.dtype)
    if not np.isfinite(fresh.scales.astype(np.float32)).all():
        largest = np.abs(values[here].astype(np.float64)).max()
        raise UserError(
            f"tensor {tensor.name}: value {largest:.6g} is too large for scales of dtype {dtype_name(scales.dtype)}; "
            "export without quantization"
        )
    codes = found[tensor.codes]
    chosen = np.where(here, fresh.codes, codes.view(np.uint8).reshape(here.shape))
    made[tensor.codes] = chosen.reshape(codes.shape).view(codes.dtype)
    made[tensor.scales] = np.where(changed, fresh.scales, scales.reshape(changed.shape)).reshape(scales.shape)
    if tensor.zeros is not None and fresh.zeros is not None:
        zeros = found[tensor.zeros]
        made[tensor.zeros] = np.where(changed, fresh.zeros, zeros.reshape(changed.shape)).reshape(zeros.shape)
    return made


def _check_finite(tensor: QuantizedTensor, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            f"tensor {tensor.name}: a value that is not finite has no place in blocks; export without quantization"
        )


def _stored(part: Part, made: np.ndarray, words: np.ndarray) -> np.ndarray:
    return made if part.packing is None else pack(made, part.packing, words.dtype)


Files = CheckpointFolder | QuantizedFolder


def open_files(folder: Path, format: Format | None, problems: list[str]) -> Files:
    """The safetensors files of a folder; of a quantised one, what is damaged is appended to `problems`.

    Raises:
        UserError: the index or a header is damaged.
    """
    stored = CheckpointFolder(folder)
    return stored if format is None else QuantizedFolder(stored, format, problems)


def is_zero_bias(files: Files, name: str) -> bool:
    """Whether a tensor is the bias of a quantised weight and all 0: AutoGPTQ gave one to each, whatever the model."""
    weight = f"{name.removesuffix('.bias')}.weight"
    if not isinstance(files, QuantizedFolder) or not name.endswith(".bias") or weight not in files.quantized:
        return False
    return not any(any(chunk) for chunk in files.iter_bytes(name))


@dataclasses.dataclass(frozen=True)
class StoredOrder:
    """The letters of a quantised tensor's binding in the order in which it is stored."""

    tensor: QuantizedTensor
    binding: Binding

    @functools.cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each stored axis."""
        return tuple(self.binding.axes[axis] for axis in self.tensor.order)

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
        return part.transpose([*fixed, *order]).reshape(-1, self.tensor.stored_shape[-1])
