"""Root-mean-square norm."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · scale over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Statistics are taken in float32; the normalised value is rounded to x's dtype before the scale multiplies
    it, as the Llama lineage does: the order matters in bfloat16.

    Args:
        x: (..., D).
        scale: (D,).
        eps: added to the mean square.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * (wide * inverse).astype(x.dtype)
