"""FP8 with scales: float8_e4m3 codes (arXiv 2209.05433), and a float32 scale for each block of a matrix, as DeepSeek-V3
has them (arXiv 2412.19437), for each row or for all of it.

    x ≈ code * scale

in float32. Every row has scales of its own here, whichever rows of the checkpoint share one: for blocks of 128 by 128
that is 3 % more memory, and a slice of rows is one of both arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from jaxmoe.codecs.tables import namespace

_E4M3 = ml_dtypes.float8_e4m3fn
_LARGEST = np.float32(448)
_LEAST_NORMAL = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Blocks:
    """A matrix, or any stack of them.

    Attributes:
        codes: (…, o, i) bits of float8_e4m3fn, as uint8, so that nothing takes them for numbers to differentiate.
        scales: (…, o, b) float32, b = ⌈i / block⌉.
        block: columns that share a scale.
        dtype: that values are rounded to, whatever dtype is asked for; None for that one alone.
    """

    codes: Any
    scales: Any
    block: int = dataclasses.field(metadata={"static": True})
    dtype: str | None = dataclasses.field(default=None, metadata={"static": True})


def quantize(values: Float[Any, "... i"], block: int, rows: int = 1) -> Fp8Blocks:
    """Quantise (…, o, i), finite, in blocks of `rows` by `block`: the largest magnitude gets the largest code, 448."""
    xp = namespace(values)
    wide = values.astype(xp.float32)
    *lead, height, width = wide.shape
    down, across = -(-height // rows), -(-width // block)
    padded = xp.pad(wide, [(0, 0)] * len(lead) + [(0, down * rows - height), (0, across * block - width)])
    largest = xp.abs(padded.reshape(*lead, down, rows, across, block)).max((-3, -1))
    scales = xp.where(largest > 0, xp.maximum(largest / _LARGEST, _LEAST_NORMAL), xp.float32(1))
    scales = xp.repeat(scales, rows, -2)[..., :height, :]
    codes = (wide / _spread(scales, block, width)).astype(_E4M3)
    bits = codes.view(np.uint8) if xp is np else jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return Fp8Blocks(bits, scales, block)


def dequantize(packed: Fp8Blocks, dtype: Any = jnp.bfloat16) -> Float[Any, "... i"]:
    """The values, (…, o, i)."""
    if namespace(packed.codes) is np:
        codes = packed.codes.view(_E4M3)
    else:
        codes = jax.lax.bitcast_convert_type(packed.codes, _E4M3)
    factors = _spread(packed.scales, packed.block, packed.codes.shape[-1])
    return (codes.astype(np.float32) * factors).astype(dtype)


def _spread(scales: Any, block: int, width: int) -> Any:
    return namespace(scales).repeat(scales, block, -1)[..., :width]
