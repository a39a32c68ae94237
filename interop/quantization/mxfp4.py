"""MXFP4 (OCP Microscaling Formats 1.0) as gpt-oss stores it: 32 numbers of 4 bits along a row share a power of two.

``X_blocks`` (U8, E × out × in/32 × 16, the low four bits of a byte first) and ``X_scales`` (U8, E × out × in/32): a
number is its code's value times 2^(scale - 127), and ``X`` is E × in × out. Quantised anew, the scale is the smallest
power of two with which no number of the block exceeds 6 (float4_e2m1's largest), so that none is cut off, and numbers
are rounded to nearest, ties to even.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.interop.quantization.block_format import (
    BF16,
    Pair,
    per_block,
    per_element,
    power_of_two_above,
    scale_problems,
    unknown_fields,
)
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.slices import finer_axes, positions

_BLOCKS, _SCALES = "_blocks", "_scales"
_COLUMNS = 32
_BYTES = _COLUMNS // 2
_BIAS = 127
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_LARGEST = 6.0
_BYTE = np.arange(256, dtype=np.uint8)
# (256, 2): twice the values of a byte's codes. 2^128, for a scale of 255, is past float32, half of it is not.
_DOUBLED = 2 * np.stack([_BYTE & 15, _BYTE >> 4], -1).view(_E2M1).astype(np.float32)
_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


class MXFP4:
    """The format; keeps the last rows that were read, see `read`."""

    block = (1, _COLUMNS)

    def __init__(self) -> None:
        self._last: tuple[Any, np.ndarray, np.ndarray] | None = None

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown.
        """
        if unknown := unknown_fields(given, _KNOWN):
            raise UserError(f"{where} has unknown fields {unknown}; known are {', '.join(sorted(_KNOWN))}")
        return cls()

    def find(
        self, tensors: Mapping[str, TensorInfo], problems: list[str]
    ) -> tuple[list[Pair], frozenset[str]]:
        """See `Format`."""
        pairs, stored = [], set()
        for name, info in tensors.items():
            if name.endswith(_SCALES):
                stored.add(name)
                blocks = name.removesuffix(_SCALES) + _BLOCKS
                if blocks not in tensors:
                    problems.append(f"tensor {name} has scales, but there is no {blocks}")
            if not name.endswith(_BLOCKS):
                continue
            stored.add(name)
            plain = name.removesuffix(_BLOCKS)
            if plain in tensors:
                problems.append(
                    f"tensor {plain} is there twice, as it is and as {name}: expected one of them"
                )
            elif len(info.shape) != 4 or info.shape[-1] != _BYTES or 0 in info.shape or info.dtype != "U8":
                problems.append(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, expected U8 of shape "
                    f"[experts, out, in / {_COLUMNS}, {_BYTES}]"
                )
            else:
                experts, rows, groups, _ = info.shape
                pair = Pair(plain, (experts, groups * _COLUMNS, rows), name, plain + _SCALES, (0, 2, 1))
                pairs.append(pair)
                problems += scale_problems(pair, tensors.get(pair.scales), info.shape[:3], ("U8",))
        return pairs, frozenset(stored)

    def read(
        self, stored: CheckpointFolder, pair: Pair, sizes: Sequence[int], box: Sequence[slice]
    ) -> np.ndarray:
        """See `Format`.

        Rows are read whole: they are so short (1,440 bytes in gpt-oss) that leaving out a part of them saves nothing.
        The tensor's order goes through every row for each of its columns, so pieces in that order would read all rows
        again and again: those of the last piece are kept until other ones are asked for.
        """
        lengths = [len(range(*part.indices(size))) for part, size in zip(box, sizes, strict=True)]
        if 0 in lengths:
            return np.empty(lengths, BF16)
        experts, columns, rows = finer_axes(pair.shape, sizes)
        at = positions(sizes, box, columns)
        first, last = int(at[0]) // _COLUMNS, int(at[-1]) // _COLUMNS + 1
        others = [*experts, *rows]
        codes, scales = self._rows(stored, pair, [sizes[a] for a in others], [box[a] for a in others])
        values = _decode(codes[..., first:last, :], scales[..., first:last])[..., at - first * _COLUMNS]
        order = [*others, *columns]
        return values.reshape([lengths[axis] for axis in order]).transpose(np.argsort(order))

    def _rows(
        self, stored: CheckpointFolder, pair: Pair, sizes: Sequence[int], box: Sequence[slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        asked = (stored, pair, tuple(sizes), tuple((part.start, part.stop) for part in box))
        kept = self._last  # read once: another thread may replace it
        if kept is not None and kept[0] == asked:
            return kept[1], kept[2]
        groups, every = pair.shape[1] // _COLUMNS, slice(None)
        codes = stored.read_box(pair.codes, (*sizes, groups, _BYTES), (*box, every, every))
        scales = stored.read_box(pair.scales, (*sizes, groups), (*box, every))
        self._last = asked, codes, scales
        return codes, scales

    def encode(self, values: np.ndarray, scales: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """See `Format`."""
        largest = per_block(np.maximum, np.abs(values), self.block).astype(np.float64)
        exponents = np.maximum(power_of_two_above(largest / _LARGEST), -_BIAS)
        exponents[largest == 0] = -_BIAS
        scaled = np.ldexp(values, -per_element(exponents, self.block, values.shape))
        codes = scaled.astype(_E2M1).view(np.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return packed.reshape(len(values), -1, _BYTES), (exponents + _BIAS).astype(scales)


def _decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(..., n, 16) and (..., n) → (..., 32 n) in bfloat16, which holds every value but those past its range."""
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - (_BIAS + 1))
    values = _DOUBLED[codes]
    with np.errstate(over="ignore"):
        values *= factors[..., None, None]
        return values.astype(BF16).reshape(*scales.shape[:-1], -1)
