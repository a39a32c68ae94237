"""nf4 and fp4 (arXiv 2305.14314): four bits a weight, and a float32 scale for each block of the tensor's elements; and
mxfp4 (OCP Microscaling Formats 1.0), whose scales are powers of two of a byte each.

The elements of a tensor in row-major order are cut into blocks, of 64 by default. The scale is the block's largest
magnitude, and an element's code that of the nearest value to what it is of the scale:

    absmax = max |x|        code = nearest(x * (1 / absmax))        x ≈ value[code] * absmax

in float32, rounded once to the dtype that is asked for; of mxfp4 the scale is the smallest power of two with which no
number is cut off. With double quantisation the scales are quantised in turn: less the mean of all scales of the tensor,
in blocks of 256, to the 8 bits of `tables.DYNAMIC`. So which elements make up one
tensor is part of what a tensor is: experts quantised one by one have other values than all of a layer as one. Without
double quantisation they do not, as long as no block has elements of two of them.

In memory codes and scales are as a loop over rows wants them (`FourBit`); `from_stored` and `to_stored` take and give
what bitsandbytes stores. All functions take jax's arrays, and numpy's. Bytes are those of bitsandbytes but for blocks
whose magnitudes are below the normal float32 numbers, which XLA takes for 0.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmoe.codecs.tables import (
    DYNAMIC,
    ZERO,
    namespace,
    nearest,
    nearest_dynamic,
    nearest_e2m1,
    values_of,
)

Array = jax.Array | np.ndarray
"""Of jax or of numpy."""

MX_BLOCK = 32
"""Numbers of mxfp4 that share a scale."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of blocks."""
SCALES_PER_BLOCK = 256
"""Scales that share one, with double quantisation."""

_LEAST = np.float32(1e-38)  # scale of a last block that is shorter
_MX_BIAS = 127
_LEAST_NORMAL = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FourBit:
    """A tensor (…, o, i) in four bits, or several alike along axes before: a pytree of arrays, and what they mean.

    Rows that are whole blocks are kept apart: codes (…, o, b, block / 2) and scales (…, o, b), so that a slice of rows,
    or of blocks of all rows, is one of both arrays. A tensor of other rows is kept as a row of its blocks, codes (b,
    block / 2) and scales (b), the last block filled up with zeros.

    Byte j of a block has element j in the high four bits and element j + block / 2 in the low ones. So each half of a
    block is made of neighbouring bytes by the same operations, which is what vectors of a CPU want, and, where a block
    is 64, gives a tensor core 32 columns at a time. (bitsandbytes has elements 2 j and 2 j + 1 in a byte.)

    Attributes:
        codes: uint8.
        absmax: float32 scales, or with double quantisation their codes in `tables.DYNAMIC`, uint8; of mxfp4 exponents,
            uint8, from 2^-127 up.
        nested_absmax: with double quantisation float32, one for 256 scales in row-major order.
        offset: with it float32, the mean of all scales.
        kind: "nf4", "fp4" or "mxfp4".
        block: elements that share a scale.
        shape: of one tensor. Axes before it are of several tensors, each with an offset of its own.
        dtype: that values are rounded to, whatever dtype is asked for; None for that one alone.
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    kind: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def has_whole_rows(self) -> bool:
        """Whether rows are whole blocks."""
        return _has_whole_rows(self.shape, self.block)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one tensor."""
        axes = len(self.shape) if self.has_whole_rows else 1
        return self.absmax.shape[: self.absmax.ndim - axes]


class Stored(NamedTuple):
    """What bitsandbytes stores of one tensor of n elements.

    Attributes:
        codes: uint8 (ceil(n / 2), 1), the first of two elements in the high four bits.
        absmax: float32 (ceil(n / block)), or with double quantisation uint8.
        nested_absmax: with it float32 (ceil(blocks / 256)).
        offset: with it float32 ().
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None = None
    offset: Array | None = None


def quantize(
    values: Float[Array, "..."], kind: str = "nf4", block: int = 64, nested: bool = False
) -> FourBit:
    """Quantise one tensor; ``jax.vmap(quantize)`` each of a stack.

    Args:
        values: (…, i), finite, of bfloat16, float16 or float32.
        kind: "nf4", "fp4" or "mxfp4".
        block: one of `BLOCKS`, of mxfp4 32.
        nested: quantise the scales, too, but of mxfp4.

    Raises:
        ValueError: another kind or block, or a tensor without elements.
        TypeError: another dtype.
    """
    _check(kind, block, values.shape)
    if values.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"found values of {values.dtype}, expected bfloat16, float16 or float32")
    xp = namespace(values)
    blocks, short = _blocks(values.astype(xp.float32), block)
    if kind == "mxfp4":
        return _quantize_mx(blocks, values.shape)
    absmax = xp.abs(blocks).max(-1)
    divisor = xp.maximum(absmax, _LEAST_NORMAL)
    scaled = blocks * (np.float32(1) / divisor)[..., None]
    if short:  # bitsandbytes divides the last block, and gives it no scale of 0
        absmax = xp.concatenate([absmax[:-1], xp.maximum(absmax[-1:], _LEAST)])
        # Where one number divides many, XLA takes the reciprocal, too.
        each = divisor[-1:, None] + 0 * blocks[-1:]
        scaled = xp.concatenate([scaled[:-1], blocks[-1:] / each])
    codes = _paired(nearest(scaled, kind))
    if not nested:
        return FourBit(codes, absmax, None, None, kind, block, values.shape)
    offset = _mean(absmax.reshape(-1))
    scales, nested_absmax = _quantize_scales(absmax.reshape(-1) - offset)
    return FourBit(codes, scales.reshape(absmax.shape), nested_absmax, offset, kind, block, values.shape)


def _quantize_mx(blocks: Array, shape: tuple[int, ...]) -> FourBit:
    """Blocks (…, 32) with the smallest power of two with which no number exceeds 6, the largest code's value."""
    xp = namespace(blocks)
    mantissas, exponents = xp.frexp(xp.abs(blocks).max(-1))
    # largest <= 6 * 2^e, where 6 is 0.75 * 2^3
    powers = xp.maximum(exponents - 3 + (mantissas > 0.75), -_MX_BIAS)
    powers = xp.where(mantissas > 0, powers, -_MX_BIAS)
    # By halves of the power: 2^127, the inverse of the smallest, would leave no room for the rest.
    first = powers // 2
    scaled = xp.ldexp(xp.ldexp(blocks, -first[..., None]), (first - powers)[..., None])
    codes = _paired(nearest_e2m1(scaled))
    return FourBit(codes, (powers + _MX_BIAS).astype(xp.uint8), None, None, "mxfp4", MX_BLOCK, shape)


def dequantize(packed: FourBit, dtype: Any = jnp.bfloat16) -> Float[Array, "..."]:
    """The values of a tensor or of a stack of them, (…, *shape)."""
    stack, shape = packed.stack, packed.shape
    values = _decode(packed.codes, plain(packed).absmax, packed.kind, dtype)
    if not packed.has_whole_rows:
        values = values.reshape(*stack, -1)[..., : math.prod(shape)]
    return values.reshape(*stack, *shape)


def part(packed: FourBit, index: int) -> FourBit | Array:
    """One of the weights along the leading axis, of a stack of tensors or within one: packed as far as it is of whole
    blocks, else its values in float32."""
    if packed.stack:
        return jax.tree.map(lambda x: x[index], packed)
    count, *shape = packed.shape
    if not packed.has_whole_rows and math.prod(shape) % packed.block:
        return dequantize(packed, jnp.float32)[index]
    if packed.nested_absmax is not None:
        packed = plain(packed)  # codes of scales are in blocks of their own
    codes, absmax = packed.codes, packed.absmax
    if not packed.has_whole_rows:
        codes, absmax = codes.reshape(count, -1, codes.shape[-1]), absmax.reshape(count, -1)
    return dataclasses.replace(packed, codes=codes[index], absmax=absmax[index], shape=tuple(shape))


def plain(packed: FourBit) -> FourBit:
    """The same with float32 scales: those that quantised ones stand for, of mxfp4 half of the powers of two."""
    xp = namespace(packed.absmax)
    if packed.kind == "mxfp4":
        return dataclasses.replace(packed, absmax=_halves_of_powers(packed.absmax))
    if packed.nested_absmax is None or packed.offset is None:
        return packed
    stack, shape = packed.stack, packed.absmax.shape
    flat = packed.absmax.reshape(*stack, -1)
    each = xp.repeat(packed.nested_absmax, SCALES_PER_BLOCK, -1)[..., : flat.shape[-1]]
    absmax = _scales(flat, each, packed.offset[..., None]).reshape(shape)
    return dataclasses.replace(packed, absmax=absmax, nested_absmax=None, offset=None)


def from_stored(stored: Stored, kind: str, block: int, shape: tuple[int, ...]) -> FourBit:
    """What bitsandbytes stores of one tensor, as a loop wants it: the same codes and scales, no value computed.

    Raises:
        ValueError: another kind or block than there are, or arrays that are not those of `shape`.
    """
    _check(kind, block, shape)
    size = math.prod(shape)
    blocks = -(-size // block)
    expected = [(-(-size // 2), 1), (blocks,)]
    found = [tuple(stored.codes.shape), tuple(stored.absmax.shape)]
    if stored.nested_absmax is not None:
        expected.append((-(-blocks // SCALES_PER_BLOCK),))
        found.append(tuple(stored.nested_absmax.shape))
    if found != expected:
        raise ValueError(f"found stored arrays of shapes {found}, expected {expected} of a tensor {shape}")
    xp = namespace(stored.codes)
    pairs = stored.codes.reshape(-1)
    flat = xp.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[:size]
    flat = xp.pad(flat, (0, blocks * block - size), constant_values=ZERO[kind])
    absmax = stored.absmax
    if _has_whole_rows(shape, block):
        absmax = absmax.reshape(*shape[:-1], -1)
    codes = _paired(flat.reshape(*absmax.shape, block))
    return FourBit(codes, absmax, stored.nested_absmax, stored.offset, kind, block, tuple(shape))


def from_codes(codes: Array, absmax: Array, kind: str, block: int, dtype: str | None = None) -> FourBit:
    """A tensor of whole rows.

    Args:
        codes: (…, o, i) uint8 below 16, i a multiple of `block`.
        absmax: (…, o, b), as `FourBit` has them.
        kind, block, dtype: see `FourBit`.
    """
    paired = _paired(codes.reshape(*absmax.shape, block))
    return FourBit(paired, absmax, None, None, kind, block, tuple(codes.shape), dtype)


def to_stored(packed: FourBit) -> Stored:
    """What bitsandbytes stores of one tensor.

    Raises:
        ValueError: it is a stack of several.
    """
    if packed.stack:
        raise ValueError(f"found a stack of {packed.stack} tensors, expected one")
    xp = namespace(packed.codes)
    size = math.prod(packed.shape)
    flat = xp.concatenate([packed.codes >> 4, packed.codes & 15], -1).reshape(-1)
    flat = xp.pad(flat[:size], (0, size % 2), constant_values=ZERO[packed.kind])
    pairs = (flat[::2] << 4) | flat[1::2]
    return Stored(pairs.reshape(-1, 1), packed.absmax.reshape(-1), packed.nested_absmax, packed.offset)


def _paired(codes: Array) -> Array:
    """Codes (…, block) → bytes (…, block / 2)."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] << 4) | codes[..., half:]


def _check(kind: str, block: int, shape: tuple[int, ...]) -> None:
    if kind not in ZERO:
        raise ValueError(f"kind is {kind!r}, expected {' or '.join(map(repr, ZERO))}")
    blocks = (MX_BLOCK,) if kind == "mxfp4" else BLOCKS
    if block not in blocks:
        raise ValueError(f"block is {block}, expected one of {', '.join(map(str, blocks))}")
    if not shape or 0 in shape:
        raise ValueError(f"found a tensor of shape {tuple(shape)}, expected one with elements")


def _has_whole_rows(shape: tuple[int, ...], block: int) -> bool:
    return shape[-1] % block == 0


def _blocks(values: Array, block: int) -> tuple[Array, bool]:
    """(…, o, b, block), or (b, block) where blocks go through rows; and whether the last one was shorter."""
    shape, xp = values.shape, namespace(values)
    if _has_whole_rows(shape, block):
        return values.reshape(*shape[:-1], -1, block), False
    missing = -math.prod(shape) % block
    return xp.pad(values.reshape(-1), (0, missing)).reshape(-1, block), missing > 0


def _decode(codes: Array, absmax: Array, kind: str, dtype: Any) -> Array:
    """Bytes (…, block / 2) and float32 scales (…) → values (…, block)."""
    halves = [_bits(values_of(half, kind) * absmax[..., None], dtype) for half in (codes >> 4, codes & 15)]
    return _of_bits(namespace(codes).concatenate(halves, -1), dtype)


def _bits(values: Array, dtype: Any) -> Array:
    """Float32 → `dtype`, of bfloat16 as uint16.

    XLA rounds to bfloat16 by way of a test for NaN that costs a CPU more than all the rest; there is none here.
    """
    if namespace(values) is np or dtype != jnp.bfloat16:
        return values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(jnp.uint16)  # to nearest, ties to even


def _of_bits(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _halves_of_powers(exponents: Array) -> Array:
    """2^(e - 128) of bytes e, float32; jax's below the normal numbers are 0."""
    if namespace(exponents) is np:
        return np.ldexp(np.float32(1), exponents.astype(np.int32) - (_MX_BIAS + 1))
    bits = jnp.maximum(exponents, 1).astype(jnp.uint32) - 1  # the exponent of a float32 counts from 2^-127
    return jax.lax.bitcast_convert_type(bits << 23, jnp.float32)


def _quantize_scales(less: Array) -> tuple[Array, Array]:
    """Scales less their mean, (n) → codes (n) and one float32 for 256 of them."""
    xp, count = namespace(less), less.shape[0]
    blocks = xp.pad(less, (0, -count % SCALES_PER_BLOCK)).reshape(-1, SCALES_PER_BLOCK)
    absmax = xp.abs(blocks).max(-1)
    there = absmax > 0
    codes = nearest_dynamic(blocks * (np.float32(1) / xp.where(there, absmax, 1))[:, None])
    return xp.where(there[:, None], codes, xp.uint8(0)).reshape(-1)[:count], absmax


def _scales(codes: Array, nested_absmax: Array, offset: Array) -> Array:
    """Codes of scales, with what each is multiplied by → scales, float32."""
    xp = namespace(codes)
    products = xp.asarray(DYNAMIC)[codes] * nested_absmax
    if xp is np:
        return products + offset
    # XLA rounds a product with a sum once. It does not where bits lie between that it does not know: the sign, 0 here.
    sign = jax.lax.bitcast_convert_type(nested_absmax, jnp.uint32) >> 31
    bits = jax.lax.bitcast_convert_type(products, jnp.uint32) ^ sign
    return jax.lax.bitcast_convert_type(bits, jnp.float32) + offset


def _mean(values: Array) -> Array:
    """Of float32 (n), by sums of pairs: the same in any place, and closer than one number after the other."""
    xp, count, first = namespace(values), values.shape[0], values[0]
    while values.shape[0] > 1:
        values = xp.pad(values, (0, values.shape[0] % 2))
        values = values[::2] + values[1::2]
    # By what XLA does not know while it compiles; otherwise it would multiply by the reciprocal.
    return values[0] / (np.float32(count) + 0 * first)
