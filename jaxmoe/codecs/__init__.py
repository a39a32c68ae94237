"""Weights of four and eight bits, bit by bit as checkpoints and bitsandbytes have them.

`four_bit` has the nf4 and fp4 of QLoRA (arXiv 2305.14314), with scales in float32 or quantised themselves, and mxfp4;
`int8_rows` the int8 of LLM.int8 (arXiv 2208.07339); `fp8_blocks` float8_e4m3 with scales of blocks. All take jax's
arrays, also under jit and vmap, and numpy's, and give arrays of the same kind. `tables` has the code books.

Letters of dimensions here: o outputs of a matrix, its rows; i inputs, its columns; b blocks of a row, i / block.
"""

from typing import Any

import jax.numpy as jnp

from jaxmoe.codecs import four_bit, fp8_blocks, int8_rows
from jaxmoe.codecs.four_bit import FourBit
from jaxmoe.codecs.fp8_blocks import Fp8Blocks
from jaxmoe.codecs.int8_rows import Int8Rows

__all__ = ["PACKED", "FourBit", "Fp8Blocks", "Int8Rows", "Packed", "unpack"]

Packed = FourBit | Fp8Blocks | Int8Rows
"""A tensor in few bits, or a stack of them."""

PACKED = (FourBit, Fp8Blocks, Int8Rows)


def unpack(packed: Packed, dtype: Any) -> Any:
    """The values of a packed tensor, or of a stack of them, in `dtype`."""
    given = jnp.dtype(dtype if packed.dtype is None else packed.dtype)
    if isinstance(packed, FourBit):
        values = four_bit.dequantize(packed, given)
    elif isinstance(packed, Fp8Blocks):
        values = fp8_blocks.dequantize(packed, given)
    else:
        values = int8_rows.dequantize(packed, given)
    return values.astype(dtype)
