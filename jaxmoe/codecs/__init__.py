"""Weights of four and eight bits, byte by byte as bitsandbytes has them.

`four_bit` has the nf4 and fp4 of QLoRA (arXiv 2305.14314), with scales in float32 or quantised themselves; `int8_rows`
the int8 of LLM.int8 (arXiv 2208.07339). Both take jax's arrays, also under jit and vmap, and numpy's, and give arrays
of the same kind. `tables` has the code books.

Letters of dimensions here: o outputs of a matrix, its rows; i inputs, its columns; b blocks of a row, i / block.
"""

from typing import Any

from jaxmoe.codecs import four_bit, int8_rows
from jaxmoe.codecs.four_bit import FourBit
from jaxmoe.codecs.int8_rows import Int8Rows

__all__ = ["FourBit", "Int8Rows", "unpack"]


def unpack(packed: FourBit | Int8Rows, dtype: Any) -> Any:
    """The values of a packed tensor, or of a stack of them, in `dtype`."""
    codec = four_bit if isinstance(packed, FourBit) else int8_rows
    return codec.dequantize(packed, dtype)
