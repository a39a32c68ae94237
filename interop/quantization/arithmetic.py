"""What codes and scales stand for, and how numbers are quantised anew.

All decoding is in float32: the value of a code, less the zero point, times a factor. Encoding chooses for each block
the smallest scale with which no number of it is cut off, or nearly so where the scale itself is rounded, and rounds to
the nearest code, ties to even.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.codecs import int8_rows, tables

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_LARGEST_FP8 = 448.0
_LARGEST_FP4 = 6.0
LARGEST_NVFP4 = _LARGEST_FP4 * _LARGEST_FP8
_SMALLEST_E4M3 = 2.0**-9
_BIAS = 127
SMALLEST_NORMAL = 2.0**-126  # subnormal scales of this range are flushed to zero by devices


class Blocks:
    """Which elements of a matrix share a scale.

    Args:
        rows: the number of the block of each row.
        columns: the same of each column.
        shape: how many blocks there are in either direction.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> None:
        self._index = (rows, columns)
        self._shape = shape

    def reduce(self, function: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Reduce the elements of each block (rows, columns) → (blocks down, blocks across); 0 for an empty block."""
        for axis, index in enumerate(self._index):
            if (index[1:] < index[:-1]).any():
                order = np.argsort(index, kind="stable")
                index, values = index[order], values.take(order, axis)
            there, starts = np.unique(index, return_index=True)
            values = function.reduceat(values, starts, axis)
            if len(there) < self._shape[axis]:
                shape = (self._shape[0], values.shape[1]) if axis == 0 else (values.shape[0], self._shape[1])
                full = np.zeros(shape, values.dtype)
                full[there if axis == 0 else (slice(None), there)] = values
                values = full
        return values

    def spread(self, blocks: np.ndarray) -> np.ndarray:
        """Repeat what there is one of per block, for every element."""
        return blocks[np.ix_(*self._index)]


class Encoded(NamedTuple):
    """A matrix quantised: codes per element; scales, and where there are such zero points, per block."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None


class Arithmetic(Protocol):
    """The numbers of one format."""

    @property
    def values(self) -> np.ndarray:
        """Value of each code, float32."""

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """Scales as they are stored → what values are multiplied by, float32."""

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """Quantise finite `values` (rows, columns), with scales of a dtype."""


@dataclasses.dataclass(frozen=True)
class FP8:
    """float8_e4m3 codes, arXiv 2209.05433.

    Attributes:
        powers: scales are powers of two.
    """

    powers: bool = False

    values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return scales.astype(np.float32)

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. The scale is the block's largest number over 448, or the next power of two above that."""
        largest = blocks.reduce(np.maximum, np.abs(values))
        exact = _positive(largest / np.float32(_LARGEST_FP8), scales)
        if self.powers or scales == E8M0:
            exact = np.ldexp(np.float32(1), _power_of_two_above(exact))
        rounded = exact.astype(scales)
        scaled = values / blocks.spread(rounded.astype(np.float32))
        # A scale rounded down leaves at most 450, which is rounded to 448.
        return Encoded(scaled.astype(E4M3).view(np.uint8), rounded)


@dataclasses.dataclass(frozen=True)
class NVFP4:
    """float4_e2m1 codes and float8_e4m3 scales, which a float32 scale of the whole tensor goes with."""

    values = np.arange(16, dtype=np.uint8).view(_E2M1).astype(np.float32)

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return scales.astype(np.float32)

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. The scale is that nearest to the block's largest number over 6."""
        largest = blocks.reduce(np.maximum, np.abs(values))
        exact = np.where(largest > 0, largest / _LARGEST_FP4, 1)
        rounded = np.clip(exact, _SMALLEST_E4M3, _LARGEST_FP8).astype(np.float32).astype(scales)
        codes = (values / blocks.spread(rounded.astype(np.float32))).astype(_E2M1)
        return Encoded(codes.view(np.uint8), rounded)


@dataclasses.dataclass(frozen=True)
class MXFP4:
    """float4_e2m1 codes and powers of two (OCP Microscaling Formats 1.0), 2^(scale - 127) of a byte.

    Values are doubled and factors halved: 2^128, for a scale of 255, is past float32, half of it is not.
    """

    values = 2 * NVFP4.values

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - (_BIAS + 1))

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. The scale is the smallest power of two with which no number of the block exceeds 6."""
        largest = blocks.reduce(np.maximum, np.abs(values)).astype(np.float64)
        exponents = np.maximum(_power_of_two_above(largest / _LARGEST_FP4), -_BIAS)
        exponents[largest == 0] = -_BIAS
        scaled = np.ldexp(values, -blocks.spread(exponents))
        return Encoded(scaled.astype(_E2M1).view(np.uint8), (exponents + _BIAS).astype(np.uint8).view(scales))


@dataclasses.dataclass(frozen=True)
class Integers:
    """Integers of few bits, all of them from 0 up with zero points, or else half of them negative.

    Attributes:
        bits: of a code.
        zeros: there are zero points.
        symmetric: zero points are in the middle of the codes.
        least_zero: smallest zero point.
        signed: codes are in two's complement, otherwise the lowest number has code 0.
    """

    bits: int
    zeros: bool = False
    symmetric: bool = True
    least_zero: int = 0
    signed: bool = False

    @property
    def values(self) -> np.ndarray:
        """See `Arithmetic`."""
        codes = np.arange(2**self.bits)
        if self.signed:
            return (codes - 2**self.bits * (codes >= self._middle)).astype(np.float32)
        return (codes - (0 if self.zeros else self._middle)).astype(np.float32)

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return scales.astype(np.float32)

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. Without symmetry the block's range with 0 in it is spread over all codes."""
        top = 2**self.bits - 1
        high, low = (blocks.reduce(function, values) for function in (np.maximum, np.minimum))
        if self.symmetric:
            exact = np.maximum(high / np.float32(top - self._middle), low / np.float32(-self._middle))
        else:
            high, low = np.maximum(high, 0), np.minimum(low, 0)
            exact = high / np.float32(top) - low / np.float32(top)
        with np.errstate(over="ignore"):
            rounded = _positive(exact, scales).astype(scales)
        factors = rounded.astype(np.float32)
        zeros = (
            np.full(rounded.shape, self._middle)
            if self.symmetric
            else np.clip(np.rint(-low / factors), self.least_zero, top)
        ).astype(np.int64)
        codes = np.rint(values / blocks.spread(factors)) + blocks.spread(zeros)
        codes = np.clip(codes, 0, top).astype(np.int64)
        if self.signed:
            codes = (codes - self._middle) & top
        return Encoded(codes.astype(np.uint8), rounded, zeros.astype(np.uint8) if self.zeros else None)


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """The 16 values of bitsandbytes' nf4 or fp4 (`jaxmoe.codecs`); the scale is the block's largest magnitude."""

    kind: str

    @property
    def values(self) -> np.ndarray:
        """See `Arithmetic`."""
        return tables.VALUES[self.kind]

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return scales

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. A number that is as near to two values gets the lower one, as in bitsandbytes."""
        largest = blocks.reduce(np.maximum, np.abs(values)).astype(scales)
        reciprocal = np.float32(1) / np.maximum(largest, np.float32(SMALLEST_NORMAL))
        return Encoded(tables.nearest(values * blocks.spread(reciprocal), self.kind), largest)


@dataclasses.dataclass(frozen=True)
class LLMInt8:
    """The int8 rows of bitsandbytes (`jaxmoe.codecs.int8_rows`); the scale is the row's largest magnitude."""

    values = Integers(8, signed=True).values

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """See `Arithmetic`."""
        return scales

    def encode(self, values: np.ndarray, blocks: Blocks, scales: np.dtype) -> Encoded:
        """See `Arithmetic`. Numbers are rounded to float16 first, as in bitsandbytes."""
        with np.errstate(over="ignore"):
            wide = values.astype(np.float16).astype(np.float32)
        largest = blocks.reduce(np.maximum, np.abs(wide)).astype(scales)
        with np.errstate(invalid="ignore"):
            codes = np.rint(wide * blocks.spread(int8_rows.TOP / np.where(largest > 0, largest, 1)))
        return Encoded(np.nan_to_num(codes).astype(np.int8).view(np.uint8), largest)


def _positive(scales: np.ndarray, dtype: Any) -> np.ndarray:
    """1 for a block of zeros, and nothing that would round to 0."""
    least = 2.0**-24 if dtype == np.float16 else SMALLEST_NORMAL
    return np.where(scales > 0, np.maximum(scales, np.float32(least)), np.float32(1))


def _power_of_two_above(values: np.ndarray) -> np.ndarray:
    """Exponents of the smallest powers of two that positive `values` do not exceed."""
    mantissas, exponents = np.frexp(values.astype(np.float64))
    return exponents - (mantissas == 0.5)
