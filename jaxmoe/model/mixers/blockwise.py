"""Attention in plain XLA, block by block of queries and keys: on CPUs, and for what cuDNN does not take."""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model.mixers.selected_keys import KEYS, unpacked_keys

_Three = tuple[jax.Array, jax.Array, jax.Array]


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
    selected_BTs: jax.Array | None
    out_BTNV: jax.Array
    lse_BMIRC: jax.Array


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    sinks: jax.Array | None = None,
    selected_BTs: jax.Array | None = None,
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
        selected_BTs: the keys that a query may see, see `jaxmoe.model.mixers.selected_keys`; None for all.
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
    if selected_BTs is not None:
        bytes_ = count * size // KEYS - selected_BTs.shape[2]
        selected_BTs = jnp.pad(selected_BTs, ((0, 0), (0, missing), (0, bytes_)))
    return _attend(_Blocks(size, scale, window), *padded, segments_BT, sinks, selected_BTs)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: _Blocks,
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    sinks_N: jax.Array | None,
    selected_BTs: jax.Array | None,
) -> jax.Array:
    return _forward(blocks, q_BTNH, k_BTMH, v_BTMV, segments_BT, sinks_N, selected_BTs)[0]


def _forward(
    blocks: _Blocks,
    q_BTNH: jax.Array,
    k_BTMH: jax.Array,
    v_BTMV: jax.Array,
    segments_BT: jax.Array | None,
    sinks_N: jax.Array | None,
    selected_BTs: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    groups = k_BTMH.shape[2]
    q_BMIQH = _queries(q_BTNH, groups, blocks)
    k_BMJSH, v_BMJSV = _keys(k_BTMH, blocks), _keys(v_BTMV, blocks)

    def step(state: _Three, pair: jax.Array) -> tuple[_Three, None]:
        query, key = pair
        out_BMVRC, top_BMRC, total_BMRC = (_block(x, query) for x in state)
        seen_BSC = _seen(blocks, segments_BT, selected_BTs, query, key)
        scores_BMSRC = _scores(blocks, _block(q_BMIQH, query), _block(k_BMJSH, key), seen_BSC)
        # Barriers stand where two operations read what each would otherwise make for itself.
        scores_BMSRC = jax.lax.optimization_barrier(scores_BMSRC)
        new_top_BMRC = jnp.maximum(top_BMRC, scores_BMSRC.max(axis=2))
        shares_BMSRC = jax.lax.optimization_barrier(jnp.exp(scores_BMSRC - new_top_BMRC[:, :, None]))
        shrink_BMRC = jnp.exp(top_BMRC - new_top_BMRC)
        value_BMSV = _block(v_BMJSV, key)
        more_BMVQ = _product("bmsv,bmsq->bmvq", value_BMSV, _joined(shares_BMSRC.astype(value_BMSV.dtype)))
        new = (
            shrink_BMRC[:, :, None] * out_BMVRC + _apart(more_BMVQ, blocks),
            new_top_BMRC,
            shrink_BMRC * total_BMRC + shares_BMSRC.sum(axis=2),
        )
        out, top, total = (_put(x, part, query) for x, part in zip(state, new, strict=True))
        return (out, top, total), None

    shape = (*q_BMIQH.shape[:3], q_BTNH.shape[2] // groups, blocks.size)
    lowest = jnp.finfo(jnp.float32).min
    if sinks_N is None:
        top_BMIRC, total_BMIRC = jnp.full(shape, lowest, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        # As a key that comes first and has no value.
        top_BMIRC = jnp.broadcast_to(_of_heads(sinks_N, groups), shape)
        total_BMIRC = jnp.ones(shape, jnp.float32)
    out_BMIVRC = jnp.zeros((*shape[:3], v_BTMV.shape[-1], *shape[3:]), jnp.float32)
    pairs = _pairs(shape[2], blocks)
    (out_BMIVRC, top_BMIRC, total_BMIRC), _ = jax.lax.scan(step, (out_BMIVRC, top_BMIRC, total_BMIRC), pairs)
    out_BMIVRC = out_BMIVRC / total_BMIRC[:, :, :, None]
    out_BTNV = _tokens(_joined(out_BMIVRC), blocks).astype(q_BTNH.dtype)
    lse_BMIRC = top_BMIRC + jnp.log(total_BMIRC)
    return out_BTNV, _Saved(q_BTNH, k_BTMH, v_BTMV, segments_BT, sinks_N, selected_BTs, out_BTNV, lse_BMIRC)


def _backward(blocks: _Blocks, saved: _Saved, dout_BTNV: jax.Array) -> tuple[Any, ...]:
    groups = saved.k_BTMH.shape[2]
    q_BMIQH, dout_BMIQV = (_queries(x, groups, blocks) for x in (saved.q_BTNH, dout_BTNV))
    k_BMJSH, v_BMJSV = _keys(saved.k_BTMH, blocks), _keys(saved.v_BTMV, blocks)
    products_BTN = jnp.sum(dout_BTNV.astype(jnp.float32) * saved.out_BTNV.astype(jnp.float32), axis=-1)
    mean_BMIRC = _apart(_queries(products_BTN[..., None], groups, blocks)[..., 0], blocks)

    def step(grads: _Three, pair: jax.Array) -> tuple[_Three, None]:
        query, key = pair
        dq_BMIHQ, dk_BMJSH, dv_BMJSV = grads
        q_BMQH, dout_BMQV = _block(q_BMIQH, query), _block(dout_BMIQV, query)
        k_BMSH, v_BMSV = _block(k_BMJSH, key), _block(v_BMJSV, key)
        seen_BSC = _seen(blocks, saved.segments_BT, saved.selected_BTs, query, key)
        scores_BMSRC = _scores(blocks, q_BMQH, k_BMSH, seen_BSC)
        shares_BMSRC = jnp.exp(scores_BMSRC - _block(saved.lse_BMIRC, query)[:, :, None])
        dshares_BMSRC = _apart(_product("bmsv,bmqv->bmsq", v_BMSV, dout_BMQV), blocks)
        dscores_BMSRC = blocks.scale * shares_BMSRC * (dshares_BMSRC - _block(mean_BMIRC, query)[:, :, None])
        shares_BMSQ, dscores_BMSQ = jax.lax.optimization_barrier(
            (_joined(shares_BMSRC.astype(v_BMSV.dtype)), _joined(dscores_BMSRC.astype(q_BMQH.dtype)))
        )
        dq_BMHQ = _product("bmsh,bmsq->bmhq", k_BMSH, dscores_BMSQ)
        dk_BMSH = _product("bmsq,bmqh->bmsh", dscores_BMSQ, q_BMQH)
        dv_BMSV = _product("bmsq,bmqv->bmsv", shares_BMSQ, dout_BMQV)
        return (
            _put(dq_BMIHQ, _block(dq_BMIHQ, query) + dq_BMHQ, query),
            _put(dk_BMJSH, _block(dk_BMJSH, key) + dk_BMSH, key),
            _put(dv_BMJSV, _block(dv_BMJSV, key) + dv_BMSV, key),
        ), None

    zero_dq, zero_dk, zero_dv = (jnp.zeros(x.shape, jnp.float32) for x in (q_BMIQH.mT, k_BMJSH, v_BMJSV))
    (dq, dk, dv), _ = jax.lax.scan(step, (zero_dq, zero_dk, zero_dv), _pairs(q_BMIQH.shape[2], blocks))
    dsinks_N = None
    if saved.sinks_N is not None:
        each_BMIRC = -jnp.exp(_of_heads(saved.sinks_N, groups) - saved.lse_BMIRC) * mean_BMIRC
        dsinks_N = each_BMIRC.sum(axis=(0, 2, 4)).reshape(-1).astype(saved.sinks_N.dtype)
    return (
        _tokens(dq, blocks).astype(saved.q_BTNH.dtype),
        _tokens(dk.mT, blocks).astype(saved.k_BTMH.dtype),
        _tokens(dv.mT, blocks).astype(saved.v_BTMV.dtype),
        None,
        dsinks_N,
        None,
    )


_attend.defvjp(_forward, _backward)


def _pairs(count: int, blocks: _Blocks) -> jax.Array:
    """(pairs, 2) int32: a block of queries and one of keys that they see, those of one block of queries in order."""
    seen = [
        (query, key)
        for query in range(count)
        for key in range(query + 1)
        if blocks.window is None or query * blocks.size - (key + 1) * blocks.size + 1 < blocks.window
    ]
    return jnp.asarray(np.asarray(seen, np.int32))


def _seen(
    blocks: _Blocks,
    segments_BT: jax.Array | None,
    selected_BTs: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """(B, S, C), or (1, S, C) where rows do not differ: which keys of one pair of blocks a query sees."""
    within = jnp.arange(blocks.size)
    age_SC = (query * blocks.size + within)[None] - (key * blocks.size + within)[:, None]
    seen = age_SC >= 0
    if blocks.window is not None:
        seen &= age_SC < blocks.window
    seen = seen[None]
    if segments_BT is not None:
        of_query_BC, of_key_BS = (
            jax.lax.dynamic_slice_in_dim(segments_BT, block * blocks.size, blocks.size, axis=1)
            for block in (query, key)
        )
        seen &= of_key_BS[:, :, None] == of_query_BC[:, None]
    if selected_BTs is not None:
        size = blocks.size // KEYS
        selected_BCs = jax.lax.dynamic_slice_in_dim(selected_BTs, query * blocks.size, blocks.size, axis=1)
        seen &= unpacked_keys(jax.lax.dynamic_slice_in_dim(selected_BCs, key * size, size, axis=2)).mT
    return seen


def _scores(blocks: _Blocks, q_BMQH: jax.Array, k_BMSH: jax.Array, seen_BSC: jax.Array) -> jax.Array:
    """(B, M, S, R, C) float32 of one pair of blocks, at its lowest where a query does not see."""
    scores_BMSRC = blocks.scale * _apart(_product("bmsh,bmqh->bmsq", k_BMSH, q_BMQH), blocks)
    return jnp.where(seen_BSC[:, None, :, None], scores_BMSRC, jnp.finfo(jnp.float32).min)


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _apart(x_Q: jax.Array, blocks: _Blocks) -> jax.Array:
    """(…, Q) → (…, R, C), in which a mask (…, 1, C) needs no division of indices."""
    return x_Q.reshape(*x_Q.shape[:-1], -1, blocks.size)


def _joined(x_RC: jax.Array) -> jax.Array:
    """(…, R, C) → (…, Q): XLA transposes operands of products that sum over two axes."""
    return x_RC.reshape(*x_RC.shape[:-2], -1)


def _block(x: jax.Array, index: jax.Array) -> jax.Array:
    """One block of (B, M, blocks, …)."""
    return jax.lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False)


def _put(x: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, block, index, axis=2)


def _queries(x_BTNH: jax.Array, groups: int, blocks: _Blocks) -> jax.Array:
    """(B, M, I, Q, H): in each of I blocks, C queries of each of the R heads that share keys."""
    return einops.rearrange(x_BTNH, "b (i c) (m r) h -> b m i (r c) h", c=blocks.size, m=groups)


def _keys(x_BTMH: jax.Array, blocks: _Blocks) -> jax.Array:
    """(B, M, J, S, H)."""
    return einops.rearrange(x_BTMH, "b (j s) m h -> b m j s h", s=blocks.size)


def _tokens(x_BMIHQ: jax.Array, blocks: _Blocks) -> jax.Array:
    """(B, M, I, H, Q) → (B, T, N, H)."""
    return einops.rearrange(x_BMIHQ, "b m i h (r c) -> b (i c) (m r) h", c=blocks.size)


def _of_heads(sinks_N: jax.Array, groups: int) -> jax.Array:
    """(1, M, 1, R, 1) float32."""
    return sinks_N.astype(jnp.float32).reshape(1, groups, 1, -1, 1)
