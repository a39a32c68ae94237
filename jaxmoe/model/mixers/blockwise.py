"""Attention in plain XLA, block by block of queries, for what cuDNN does not take."""

import einops
import jax
import jax.numpy as jnp

_QUERIES_PER_BLOCK = 1024


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSMH: jax.Array,
    v_BSMH: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(scores) · v, causal, the softmax in float32; with sinks softmax([scores, sink])[:-1] · v.

    No public function of jax takes sinks, nor gives the sums of the softmax with a gradient. This one goes through
    blocks of queries and computes each again in the backward pass: it holds the scores of one block, (B, N, block, S).

    Args:
        q_BTNH: queries, here and below with or without the batch.
        k_BSMH: keys, S = T; M divides N.
        v_BSMH: values, of any head width.
        mask: (B, 1, T, S) bool or None.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
        sinks: (N,), one more logit per head, that attends to nothing.

    Returns:
        (B, T, N, value width) in q's dtype.
    """
    length = q_BTNH.shape[-3]
    size = min(length, _QUERIES_PER_BLOCK)
    count = -(-length // size)
    q_BTNH = _padded(q_BTNH, -3, count * size)
    mask = None if mask is None else _padded(mask, -2, count * size)

    @jax.checkpoint
    def block(index: jax.Array) -> jax.Array:
        start = index * size
        query = jax.lax.dynamic_slice_in_dim(q_BTNH, start, size, q_BTNH.ndim - 3)
        seen = _seen(start + jnp.arange(size), length, window)
        if mask is not None:
            own = jax.lax.dynamic_slice_in_dim(mask, start, size, mask.ndim - 2)
            seen = _leading(seen, own) & own
        return _attend(query, k_BSMH, v_BSMH, seen, scale, sinks)

    if count == 1:
        return block(jnp.int32(0))
    outs = jax.lax.map(block, jnp.arange(count))
    return jnp.concatenate(list(outs), axis=-3)[..., :length, :, :]


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, missing)


def _seen(query: jax.Array, keys: int, window: int | None) -> jax.Array:
    """(queries, keys) bool: not later, and not before the window."""
    age = query[:, None] - jnp.arange(keys)[None]
    return (age >= 0) if window is None else (age >= 0) & (age < window)


def _leading(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with axes of 1 before its own, as many as `like` has."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    scale: float,
    sinks: jax.Array | None,
) -> jax.Array:
    groups = key.shape[-2]
    query = einops.rearrange(query, "... t (m n) h -> ... t m n h", m=groups)
    scores = scale * jnp.einsum("...tmnh,...smh->...mnts", query, key, preferred_element_type=jnp.float32)
    # (…, heads, queries, keys) as the mask has it; those of keys and the queries that share them are two axes here.
    seen = jnp.expand_dims(seen, -3) if seen.ndim > 2 else seen
    scores = jnp.where(_leading(seen, scores), scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        shares = jax.nn.softmax(scores, axis=-1)
    else:
        sink = _leading(sinks.astype(jnp.float32).reshape(groups, -1)[:, :, None, None], scores)
        top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
        exponentials = jnp.exp(scores - top)
        shares = exponentials / (exponentials.sum(-1, keepdims=True) + jnp.exp(sink - top))
    out = jnp.einsum("...mnts,...smh->...tmnh", shares.astype(value.dtype), value)
    return einops.rearrange(out, "... t m n h -> ... t (m n) h")
