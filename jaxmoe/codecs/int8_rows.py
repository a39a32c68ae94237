"""The weights of LLM.int8 (arXiv 2208.07339): eight bits a weight, and a scale for each row.

    absmax = max |x|        code = round(x * (127 / absmax))        x ≈ code * absmax * (1 / 127)

in float32, of values rounded to float16 first, as bitsandbytes does it. A row of zeros has codes 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmoe.codecs.tables import namespace

TOP = np.float32(127)
UNIT = np.float32(7.874015718698502e-3)
"""1 / 127, by which products of codes and scales are multiplied."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """A matrix, or any stack of them.

    Attributes:
        codes: int8 (…, o, i).
        absmax: float32 (…, o), what bitsandbytes calls SCB.
        dtype: that values are rounded to, whatever dtype is asked for; None for that one alone.
    """

    codes: Any
    absmax: Any
    dtype: str | None = dataclasses.field(default=None, metadata={"static": True})


def quantize(values: Float[Any, "... i"]) -> Int8Rows:
    """Quantise each row of (…, o, i); values are finite, and of at most 65504."""
    xp = namespace(values)
    wide = values.astype(xp.float16).astype(xp.float32)
    absmax = xp.abs(wide).max(-1)
    factors = TOP / xp.where(absmax > 0, absmax, 1)
    return Int8Rows(xp.rint(wide * factors[..., None]).astype(xp.int8), absmax)


def dequantize(packed: Int8Rows, dtype: Any = jnp.bfloat16) -> Float[Any, "... i"]:
    """The values, (…, o, i)."""
    xp = namespace(packed.codes)
    products = packed.codes.astype(xp.float32) * packed.absmax[..., None]
    return (products * UNIT).astype(dtype)
