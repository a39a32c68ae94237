"""Weights of four and eight bits, byte by byte as bitsandbytes has them.

`four_bit` has the nf4 and fp4 of QLoRA (arXiv 2305.14314), with scales in float32 or quantised themselves; `int8_rows`
the int8 of LLM.int8 (arXiv 2208.07339). Both take jax's arrays, also under jit and vmap, and numpy's, and give arrays
of the same kind. `tables` has the code books.

Letters of dimensions here: o outputs of a matrix, its rows; i inputs, its columns; b blocks of a row, i / block.
"""
