"""Weights of four and eight bits, exactly as bitsandbytes has them: QLoRA (arXiv 2305.14314), LLM.int8 (arXiv 2208.07339).

`four_bit` has nf4 and fp4, with scales in float32 or quantised themselves; `int8_rows` the int8 of LLM.int8. Both take jax's
arrays, also under jit and vmap, and numpy's, and give arrays of the same kind. `tables` has the code books.

Letters of dimensions here: o outputs of a matrix, its rows; i inputs, its columns; h bytes of a row, i / 2; b blocks of
a row, i / block.
"""
