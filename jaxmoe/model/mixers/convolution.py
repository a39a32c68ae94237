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

    The backward pass keeps the operands alone.

    Args:
        x_BTX: inputs.
        filters_Xc: c taps for each channel, that of the token itself last.
        bias_X: or None.
        documents_BT: another number where another document begins; None where a row is one.
        tail_BcX: the c − 1 inputs before the first token, of its document; None for zeros.
        silu: false leaves the sum as it is.
    """
    if tail_BcX is None:
        tail_BcX = jnp.zeros((x_BTX.shape[0], filters_Xc.shape[1] - 1, x_BTX.shape[2]), x_BTX.dtype)
    return _convolve(silu, x_BTX, filters_Xc, bias_X, documents_BT, tail_BcX)


def _extended(x_BTX: jax.Array, tail_BcX: jax.Array) -> jax.Array:
    """(B, c − 1 + T, X): what the windows of all tokens are slices of."""
    return jnp.concatenate([tail_BcX.astype(x_BTX.dtype), x_BTX], axis=1)


def _own(documents_BT: jax.Array, back: int) -> jax.Array:
    """(B, T, 1) bool: whether the token so many places back is of the same document; before the first all are."""
    earlier_BT = jnp.pad(documents_BT, ((0, 0), (back, 0)), mode="edge")[:, : documents_BT.shape[1]]
    return (earlier_BT == documents_BT)[..., None]


def _before_silu(
    extended_BSX: jax.Array, filters_Xc: jax.Array, bias_X: jax.Array | None, documents_BT: jax.Array | None
) -> jax.Array:
    """(B, T, X) float32."""
    taps = filters_Xc.shape[1]
    length = extended_BSX.shape[1] - taps + 1
    total_BTX = jnp.zeros((), jnp.float32)
    for tap in range(taps):
        inputs_BTX = extended_BSX[:, tap : tap + length].astype(jnp.float32)
        if documents_BT is not None and tap < taps - 1:
            inputs_BTX = jnp.where(_own(documents_BT, taps - 1 - tap), inputs_BTX, 0.0)
        total_BTX += filters_Xc[:, tap].astype(jnp.float32)[None, None] * inputs_BTX
    return total_BTX if bias_X is None else total_BTX + bias_X.astype(jnp.float32)[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
    silu: bool,
    x_BTX: jax.Array,
    filters_Xc: jax.Array,
    bias_X: jax.Array | None,
    documents_BT: jax.Array | None,
    tail_BcX: jax.Array,
) -> jax.Array:
    total_BTX = _before_silu(_extended(x_BTX, tail_BcX), filters_Xc, bias_X, documents_BT)
    return (jax.nn.silu(total_BTX) if silu else total_BTX).astype(x_BTX.dtype)


def _convolve_forward(
    silu: bool, *operands: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    return _convolve(silu, *operands), operands


def _convolve_backward(
    silu: bool, operands: tuple[jax.Array, ...], d_out_BTX: jax.Array
) -> tuple[jax.Array | None, ...]:
    x_BTX, filters_Xc, bias_X, documents_BT, tail_BcX = operands
    taps, length = filters_Xc.shape[1], x_BTX.shape[1]
    extended_BSX = _extended(x_BTX, tail_BcX)
    d_total_BTX = d_out_BTX.astype(jnp.float32)
    if silu:
        total_BTX = _before_silu(extended_BSX, filters_Xc, bias_X, documents_BT)
        d_total_BTX = jax.vjp(jax.nn.silu, total_BTX)[1](d_total_BTX)[0]
    margin = ((0, 0), (taps - 1, taps - 1), (0, 0))
    # Once for all taps: fused into the sum of each of them, XLA would compute the convolution that often.
    extended_BSX, d_padded_BsX = jax.lax.optimization_barrier((extended_BSX, jnp.pad(d_total_BTX, margin)))
    d_extended_BSX, d_filters = jnp.zeros((), jnp.float32), []
    for tap in range(taps):
        inputs_BTX = extended_BSX[:, tap : tap + length].astype(jnp.float32)
        d_total_BTX = d_padded_BsX[:, taps - 1 : taps - 1 + length]
        # The same, for each input at the place of the token that it is read for.
        d_read_BSX = d_padded_BsX[:, taps - 1 - tap : 2 * (taps - 1) - tap + length]
        if documents_BT is not None and tap < taps - 1:
            own_BT1 = _own(documents_BT, taps - 1 - tap)
            d_total_BTX = jnp.where(own_BT1, d_total_BTX, 0.0)
            own_BS1 = jnp.pad(own_BT1, ((0, 0), (tap, taps - 1 - tap), (0, 0)))
            d_read_BSX = jnp.where(own_BS1, d_read_BSX, 0.0)
        d_filters.append(jnp.sum(d_total_BTX * inputs_BTX, axis=(0, 1)))
        d_extended_BSX += filters_Xc[:, tap].astype(jnp.float32)[None, None] * d_read_BSX
    return (
        d_extended_BSX[:, taps - 1 :].astype(x_BTX.dtype),
        jnp.stack(d_filters, axis=1).astype(filters_Xc.dtype),
        None if bias_X is None else jnp.sum(d_padded_BsX, axis=(0, 1)).astype(bias_X.dtype),
        None,
        d_extended_BSX[:, : taps - 1].astype(tail_BcX.dtype),
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def tail_after(
    x_BTX: Float[Array, "B T X"], tail_BcX: Float[Array, "B tail X"], count_B: Int[Array, "B"]
) -> Float[Array, "B tail X"]:
    """The last inputs of a convolution after so many of these tokens, for the next call's `tail_BcX`."""
    together_BTX = jnp.concatenate([tail_BcX.astype(x_BTX.dtype), x_BTX], axis=1)
    places_Bc = count_B[:, None] + jnp.arange(tail_BcX.shape[1])[None]
    return jnp.take_along_axis(together_BTX, places_Bc[..., None], axis=1)
