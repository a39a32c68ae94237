"""Attention whose softmax has one more logit per head that attends to nothing."""

import einops
import jax
import jax.numpy as jnp


def attention_with_sinks(
    q_BTNH: jax.Array,
    k_BSMH: jax.Array,
    v_BSMH: jax.Array,
    mask: jax.Array | None,
    *,
    sinks: jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    """softmax([scores, sink])[:-1] · v, causal; the softmax in float32.

    No public function of jax takes sinks, nor gives the sums of the softmax with a gradient: this one holds the
    (B, N, T, S) scores.

    Args:
        q_BTNH: queries, here and below with or without the batch.
        k_BSMH: keys, S = T; M divides N.
        v_BSMH: values, of any head width.
        mask: (B, 1, T, S) bool or None.
        sinks: (N,).
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.

    Returns:
        (B, T, N, value width) in q's dtype.
    """
    length, groups = q_BTNH.shape[-3], k_BSMH.shape[-2]
    q = einops.rearrange(q_BTNH, "... t (m n) h -> ... t m n h", m=groups)
    scores = scale * jnp.einsum("...tmnh,...smh->...mnts", q, k_BSMH, preferred_element_type=jnp.float32)
    age = jnp.arange(length)[:, None] - jnp.arange(length)
    seen = (age >= 0) if window is None else (age >= 0) & (age < window)
    if mask is not None:
        seen = seen & jnp.expand_dims(mask, -3)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    sink = sinks.astype(jnp.float32).reshape(groups, -1)[:, :, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
    exponentials = jnp.exp(scores - top)
    shares = exponentials / (exponentials.sum(-1, keepdims=True) + jnp.exp(sink - top))
    out = jnp.einsum("...mnts,...smh->...tmnh", shares.astype(v_BSMH.dtype), v_BSMH)
    return einops.rearrange(out, "... t m n h -> ... t (m n) h")
