"""The short causal convolution before a recurrence, or in its place: every channel by itself, over the last tokens."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_convolution(
    x_BTX: Float[Array, "B T X"],
    filters_Xc: Float[Array, "X c"],
    bias_X: Float[Array, "X"] | None = None,
    documents_BT: Int[Array, "B T"] | None = None,
    tail_BcX: Float[Array, "B tail X"] | None = None,
    *,
    silu: bool = True,
) -> Float[Array, "B T X"]:
    """silu(bias + Σ_i filter_i x_{t − c + 1 + i}) over c tokens of t's own document, in float32, in x's dtype.

    The backward pass keeps x alone.

    Args:
        x_BTX: inputs.
        filters_Xc: c taps for each channel, that of the token itself last.
        bias_X: or None.
        documents_BT: another number where another document begins; None where a row is one.
        tail_BcX: the c − 1 inputs before the first token, of its document; None for zeros.
        silu: false leaves the sum as it is.
    """
    convolve = jax.checkpoint(functools.partial(_convolve, silu), prevent_cse=False)
    return convolve(x_BTX, filters_Xc, bias_X, documents_BT, tail_BcX)


def _convolve(
    silu: bool,
    x_BTX: jax.Array,
    filters_Xc: jax.Array,
    bias_X: jax.Array | None,
    documents_BT: jax.Array | None,
    tail_BcX: jax.Array | None,
) -> jax.Array:
    length, taps = x_BTX.shape[1], filters_Xc.shape[1]
    wide_BTX, filters_Xc = x_BTX.astype(jnp.float32), filters_Xc.astype(jnp.float32)
    before = ((0, 0), (taps - 1, 0), (0, 0))
    if tail_BcX is None:
        extended_BTX = jnp.pad(wide_BTX, before)
    else:
        extended_BTX = jnp.concatenate([tail_BcX.astype(jnp.float32), wide_BTX], axis=1)
    if documents_BT is not None:
        earlier_BT = jnp.pad(documents_BT, before[:2], mode="edge")  # before the first token all is zero
    total_BTX = jnp.zeros_like(wide_BTX)
    for tap in range(taps):
        inputs_BTX = extended_BTX[:, tap : tap + length]
        if documents_BT is not None and tap < taps - 1:
            own_BT = earlier_BT[:, tap : tap + length] == documents_BT
            inputs_BTX = jnp.where(own_BT[..., None], inputs_BTX, 0.0)
        total_BTX += filters_Xc[:, tap][None, None] * inputs_BTX
    if bias_X is not None:
        total_BTX += bias_X.astype(jnp.float32)[None, None]
    return (jax.nn.silu(total_BTX) if silu else total_BTX).astype(x_BTX.dtype)


def tail_after(
    x_BTX: Float[Array, "B T X"], tail_BcX: Float[Array, "B tail X"], count_B: Int[Array, "B"]
) -> Float[Array, "B tail X"]:
    """The last inputs of a convolution after so many of these tokens, for the next call's `tail_BcX`."""
    together_BTX = jnp.concatenate([tail_BcX.astype(x_BTX.dtype), x_BTX], axis=1)
    places_Bc = count_B[:, None] + jnp.arange(tail_BcX.shape[1])[None]
    return jnp.take_along_axis(together_BTX, places_Bc[..., None], axis=1)
