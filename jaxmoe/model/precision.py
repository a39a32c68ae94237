"""Matrix products in the dtype that was asked for."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def float32_matmuls(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """While code that computes in float32 is traced: its products are of float32 too.

    By default XLA rounds the operands of a float32 product to TF32 (10 bits of mantissa) on NVIDIA GPUs and to
    bfloat16 on TPUs. Does nothing for other dtypes, and where ``jax_default_matmul_precision`` is set already.
    """
    if jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None:  # type: ignore[attr-defined]
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x · factor in x's dtype, rounded once: in bfloat16 the factor itself would be off by up to 0.4 %."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)
