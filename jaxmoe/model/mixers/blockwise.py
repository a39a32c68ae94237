"""Attention in plain XLA, block by block of queries and keys: on CPUs, and for what cuDNN does not take."""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np


class _Blocks(NamedTuple):
    """What a program is made for.

    Attributes:
        size: tokens of a block.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
    """

    size: int
    scale: float
    window: int | None


class _Saved(NamedTuple):
    """For the backward pass: operands, the output, and the logarithm of each softmax's denominator."""

    q_BTNH: jax.Array
    k_BTMH: jax.Array
    v_BTMV: jax.Array
    segments_BT: jax.Array | None
    sinks_N: jax.Array | None
    out_BTNV: jax.Array
    lse_BMIQ: jax.Array


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    sinks: jax.Array | None = None,
    block: int = 128,
) -> jax.Array:
    """softmax(scores) · v, causal, the softmax in float32; with sinks softmax([scores, sink])[:-1] · v.

    The softmax is summed up block by block of keys, and the backward pass computes each block's scores again from one
    number per query (Dao et al., arXiv 2205.14135): memory grows with T. Pairs of blocks that no query sees into are
    never computed. Scores lie with the keys first, so that a CPU's sums over keys run along its vectors, and so that
    three of the backward pass's five products read them as they lie.

    Args:
        q_BTNH: queries.
        k_BTMH: keys; M divides N.
        v_BTMV: values, of any head width.
        segments_BT: int32, a query sees the keys of its own number; None where causality alone keeps documents apart.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
        sinks: (N,), one more logit per head, that attends to nothing.
        block: tokens of a block at most, rounded up to eights.

    Returns:
        (B, T, N, V) in q's dtype.
    """
    length = q_BTNH.shape[1]
    count = -(-length // block)
    size = -(-length // (8 * count)) * 8
    missing = count * size - length
    # Padding is later than every query that counts.
    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q_BTNH, k_BTMH, v_BTMV)]
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, missing)))
    return _attend(_Blocks(size, scale, window), *padded, segments_BT, sinks)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: _Blocks,
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
    return _forward(blocks, q_BTNH, k_BTMH, v_BTMV, segments_BT, sinks_N)[0]


def _forward(
    blocks: _Blocks,
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    sinks_N: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    groups = k_BTMH.shape[2]
    q_BMIQH = _queries(q_BTNH, groups, blocks)
    k_BMJSH, v_BMJSV = _keys(k_BTMH, blocks), _keys(v_BTMV, blocks)

    def step(state: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        query, key = pair
        out_BMVQ, top_BMQ, total_BMQ = (_block(x, query) for x in state)
        scores_BMSQ = _scores(blocks, _block(q_BMIQH, query), _block(k_BMJSH, key), segments_BT, query, key)
        new_top_BMQ = jnp.maximum(top_BMQ, scores_BMSQ.max(axis=2))
        # Read by a sum and by a product, which would each compute it.
        shares_BMSQ = jax.lax.optimization_barrier(jnp.exp(scores_BMSQ - new_top_BMQ[:, :, None]))
        shrink_BMQ = jnp.exp(top_BMQ - new_top_BMQ)
        value_BMSV = _block(v_BMJSV, key)
        more_BMVQ = _product("bmsv,bmsq->bmvq", value_BMSV, shares_BMSQ.astype(value_BMSV.dtype))
        new = (
            shrink_BMQ[:, :, None] * out_BMVQ + more_BMVQ,
            new_top_BMQ,
            shrink_BMQ * total_BMQ + shares_BMSQ.sum(axis=2),
        )
        return tuple(_put(x, part, query) for x, part in zip(state, new, strict=True)), None

    shape = q_BMIQH.shape[:-1]
    lowest = jnp.finfo(jnp.float32).min
    if sinks_N is None:
        top_BMIQ, total_BMIQ = jnp.full(shape, lowest, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        # As a key that comes first and has no value.
        top_BMIQ = jnp.broadcast_to(_of_heads(sinks_N, groups, blocks), shape)
        total_BMIQ = jnp.ones(shape, jnp.float32)
    out_BMIVQ = jnp.zeros((*shape[:3], v_BTMV.shape[-1], shape[-1]), jnp.float32)
    pairs = _pairs(shape[2], blocks)
    (out_BMIVQ, top_BMIQ, total_BMIQ), _ = jax.lax.scan(step, (out_BMIVQ, top_BMIQ, total_BMIQ), pairs)
    out_BTNV = _tokens(out_BMIVQ / total_BMIQ[:, :, :, None], blocks).astype(q_BTNH.dtype)
    lse_BMIQ = top_BMIQ + jnp.log(total_BMIQ)
    return out_BTNV, _Saved(q_BTNH, k_BTMH, v_BTMV, segments_BT, sinks_N, out_BTNV, lse_BMIQ)


def _backward(blocks: _Blocks, saved: _Saved, dout_BTNV: jax.Array) -> tuple[Any, ...]:
    groups = saved.k_BTMH.shape[2]
    q_BMIQH, dout_BMIQV = (_queries(x, groups, blocks) for x in (saved.q_BTNH, dout_BTNV))
    k_BMJSH, v_BMJSV = _keys(saved.k_BTMH, blocks), _keys(saved.v_BTMV, blocks)
    products_BTN = jnp.sum(dout_BTNV.astype(jnp.float32) * saved.out_BTNV.astype(jnp.float32), axis=-1)
    mean_BMIQ = _queries(products_BTN[..., None], groups, blocks)[..., 0]

    def step(grads: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        query, key = pair
        dq_BMIHQ, dk_BMJSH, dv_BMJSV = grads
        q_BMQH, dout_BMQV = _block(q_BMIQH, query), _block(dout_BMIQV, query)
        k_BMSH, v_BMSV = _block(k_BMJSH, key), _block(v_BMJSV, key)
        scores_BMSQ = _scores(blocks, q_BMQH, k_BMSH, saved.segments_BT, query, key)
        shares_BMSQ = jnp.exp(scores_BMSQ - _block(saved.lse_BMIQ, query)[:, :, None])
        dshares_BMSQ = _product("bmsv,bmqv->bmsq", v_BMSV, dout_BMQV)
        dscores_BMSQ = blocks.scale * shares_BMSQ * (dshares_BMSQ - _block(mean_BMIQ, query)[:, :, None])
        # Read by two products each, as above.
        shares_BMSQ, dscores_BMSQ = jax.lax.optimization_barrier(
            (shares_BMSQ.astype(v_BMSV.dtype), dscores_BMSQ.astype(q_BMQH.dtype))
        )
        dq_BMHQ = _product("bmsh,bmsq->bmhq", k_BMSH, dscores_BMSQ)
        dk_BMSH = _product("bmsq,bmqh->bmsh", dscores_BMSQ, q_BMQH)
        dv_BMSV = _product("bmsq,bmqv->bmsv", shares_BMSQ, dout_BMQV)
        return (
            _put(dq_BMIHQ, _block(dq_BMIHQ, query) + dq_BMHQ, query),
            _put(dk_BMJSH, _block(dk_BMJSH, key) + dk_BMSH, key),
            _put(dv_BMJSV, _block(dv_BMJSV, key) + dv_BMSV, key),
        ), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BMIQH.mT, k_BMJSH, v_BMJSV)]
    (dq, dk, dv), _ = jax.lax.scan(step, tuple(zeros), _pairs(q_BMIQH.shape[2], blocks))
    dsinks_N = None
    if saved.sinks_N is not None:
        sink_MQ = _of_heads(saved.sinks_N, groups, blocks)
        each_BMIQ = -jnp.exp(sink_MQ - saved.lse_BMIQ) * mean_BMIQ
        each_MR = einops.reduce(each_BMIQ, "b m i (r t) -> m r", "sum", t=blocks.size)
        dsinks_N = each_MR.reshape(-1).astype(saved.sinks_N.dtype)
    return (
        _tokens(dq, blocks).astype(saved.q_BTNH.dtype),
        _tokens(dk.mT, blocks).astype(saved.k_BTMH.dtype),
        _tokens(dv.mT, blocks).astype(saved.v_BTMV.dtype),
        None,
        dsinks_N,
    )


_attend.defvjp(_forward, _backward)


def _pairs(count: int, blocks: _Blocks) -> np.ndarray:
    """(pairs, 2) int32: a block of queries and one of keys that they see, those of one block of queries in order."""
    seen = [
        (query, key)
        for query in range(count)
        for key in range(query + 1)
        if blocks.window is None or query * blocks.size - (key + 1) * blocks.size + 1 < blocks.window
    ]
    return np.asarray(seen, np.int32)


def _scores(
    blocks: _Blocks,
    q_BMQH: jax.Array,
    k_BMSH: jax.Array,
    segments_BT: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """(B, M, S, Q) float32 of one pair of blocks, at its lowest where a query does not see."""
    sharing = q_BMQH.shape[2] // blocks.size
    within = jnp.arange(blocks.size)
    age_SQ = (query * blocks.size + jnp.tile(within, sharing))[None] - (key * blocks.size + within)[:, None]
    seen = age_SQ >= 0
    if blocks.window is not None:
        seen &= age_SQ < blocks.window
    seen = seen[None, None]
    if segments_BT is not None:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, segments_BT, slice_size=blocks.size, axis=1)
        of_query_BQ = jnp.tile(cut(query * blocks.size), (1, sharing))
        seen &= cut(key * blocks.size)[:, None, :, None] == of_query_BQ[:, None, None, :]
    scores_BMSQ = blocks.scale * _product("bmsh,bmqh->bmsq", k_BMSH, q_BMQH)
    return jnp.where(seen, scores_BMSQ, jnp.finfo(jnp.float32).min)


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _block(x: jax.Array, index: jax.Array) -> jax.Array:
    """One block of (B, M, blocks, …)."""
    return jax.lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False)


def _put(x: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, block, index, axis=2)


def _queries(x_BTNH: jax.Array, groups: int, blocks: _Blocks) -> jax.Array:
    """(B, M, I, Q, H): in each of I blocks the queries, Q, of the heads that share keys."""
    return einops.rearrange(x_BTNH, "b (i t) (m r) h -> b m i (r t) h", t=blocks.size, m=groups)


def _keys(x_BTMH: jax.Array, blocks: _Blocks) -> jax.Array:
    """(B, M, J, S, H)."""
    return einops.rearrange(x_BTMH, "b (j s) m h -> b m j s h", s=blocks.size)


def _tokens(x_BMIHQ: jax.Array, blocks: _Blocks) -> jax.Array:
    """(B, M, I, H, Q) → (B, T, N, H)."""
    return einops.rearrange(x_BMIHQ, "b m i h (r t) -> b (i t) (m r) h", t=blocks.size)


def _of_heads(sinks_N: jax.Array, groups: int, blocks: _Blocks) -> jax.Array:
    """(1, M, 1, Q) float32: of every query its head's."""
    sinks_MR = sinks_N.astype(jnp.float32).reshape(groups, -1)
    return jnp.repeat(sinks_MR, blocks.size, axis=1)[None, :, None]
