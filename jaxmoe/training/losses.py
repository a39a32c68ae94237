"""Losses: next-token cross-entropy without ever holding all logits, and the router's balance terms."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.head import Head
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.parallel.sharding import BATCH_AXES, current_mesh

IGNORED = -1
"""A target that is not predicted."""

_LOGITS_PER_CHUNK = 2**26
"""Logits that a device holds at once, in elements: 256 MiB in float32."""


def next_token_targets(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Targets (B, T): the next token of the same document, `IGNORED` at its last token and on padding.

    Args:
        tokens: (B, T) int32.
        segment_ids: (B, T) int32 with 0 for padding, or None when every row is one document.
    """
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is None:
        return following
    next_segment = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((next_segment == segment_ids) & (segment_ids > 0), following, IGNORED)


def linear_cross_entropy(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array) -> jax.Array:
    """Sum of -log softmax(logits)[target], in nats, over all targets that are not `IGNORED`.

    The sequence is cut into chunks and only one chunk's logits exist at a time. When a gradient is asked for,
    it is computed in the same pass (softmax minus one-hot needs nothing from later), so that the logits are
    never computed twice; the idea is that of Liger's fused linear cross-entropy (arXiv 2410.10989).

    On a mesh each device goes through the chunks of its own rows and its own part of the vocabulary. The head
    is gathered along "fsdp" once before the chunks and its gradient, summed locally in float32, is reduced once
    after them. Within a chunk only sums over the vocabulary and hidden's gradient are exchanged, over "tensor".

    Args:
        hidden_BTD: (B, T, D).
        head: its weight (V, D) is multiplied in hidden's dtype; gradients of weight and bias are summed in
            float32 and have their own dtypes. On a mesh, "tensor" divides V and "fsdp" divides D.
        targets_BT: (B, T) int32.

    Returns:
        () float32.
    """
    with float32_matmuls(hidden_BTD.dtype):
        return _linear_cross_entropy(hidden_BTD, head, targets_BT)


@jax.custom_vjp
def _linear_cross_entropy(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array) -> jax.Array:
    return _on_mesh(_local_loss, hidden_BTD, head, targets_BT)


def _forward(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Head]]:
    loss, dhidden_BTD, dhead = _on_mesh(_local_loss_and_gradients, hidden_BTD, head, targets_BT)
    return loss, (dhidden_BTD[: hidden_BTD.shape[0]], dhead)


def _backward(saved: tuple[jax.Array, Head], grad: jax.Array) -> tuple[jax.Array, Head, None]:
    dhidden_BTD, dhead = jax.tree.map(lambda value: (grad * value).astype(value.dtype), saved)
    return dhidden_BTD, dhead, None


_linear_cross_entropy.defvjp(_forward, _backward)


class _Axes(NamedTuple):
    """Mesh axes that split the operands; without a mesh (), over which every collective is the identity."""

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()


def _on_mesh(local: Any, hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array) -> Any:
    """Call `local` on each device's parts. Gradients of hidden have rows added until the mesh divides them."""
    mesh = current_mesh()
    if mesh is None:
        return local(hidden_BTD, head, targets_BT, _Axes())
    missing = -hidden_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, missing), (0, 0), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, missing), (0, 0)), constant_values=IGNORED)
    rows = P(BATCH_AXES)
    parts = Head(P("tensor", "fsdp"), None if head.bias is None else P("tensor"), head.spec)
    return jax.shard_map(
        functools.partial(local, axes=_Axes(BATCH_AXES, ("tensor",), ("fsdp",))),
        mesh=mesh,
        in_specs=(rows, parts, rows),
        out_specs=P() if local is _local_loss else (P(), rows, parts),
        check_vma=False,
    )(hidden_BTD, head, targets_BT)


def _local_loss(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, axes: _Axes) -> jax.Array:
    head = dataclasses.replace(head, weight=_gathered(head.weight, hidden_BTD.dtype, axes))

    def body(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _chunk(*piece, head, axes).loss, None

    pieces = _chunks(hidden_BTD, targets_BT, head.weight)
    return jax.lax.psum(jax.lax.scan(body, jnp.zeros((), jnp.float32), pieces)[0], axes.rows)


def _local_loss_and_gradients(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, axes: _Axes
) -> tuple[jax.Array, jax.Array, Head]:
    own, head = head, dataclasses.replace(head, weight=_gathered(head.weight, hidden_BTD.dtype, axes))
    head_VD = head.weight

    def body(
        carry: tuple[jax.Array, Head], piece: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Head], jax.Array]:
        (total, dhead), (hidden, targets) = carry, piece
        chunk = _chunk(hidden, targets, head, axes)
        softmax = jnp.exp(chunk.logits - chunk.lse[..., None])
        one_hot = chunk.own_targets[..., None] == jnp.arange(head_VD.shape[0])
        dlogits = jnp.where(targets[..., None] == IGNORED, 0.0, softmax - one_hot)
        dlogits = head.spec.cotangent(chunk.logits, dlogits)
        dbias_V = None if dhead.bias is None else dhead.bias + jnp.sum(dlogits, axis=(0, 1))
        dlogits = dlogits.astype(hidden.dtype)
        dhead_VD = dhead.weight + jnp.einsum(
            "btv,btd->vd", dlogits, hidden, preferred_element_type=jnp.float32
        )
        dhidden = jnp.einsum("btv,vd->btd", dlogits, head_VD, preferred_element_type=jnp.float32)
        dhidden = jax.lax.psum(dhidden, axes.vocabulary).astype(hidden.dtype)
        return (total + chunk.loss, Head(dhead_VD, dbias_V, head.spec)), dhidden

    start = jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), (jnp.zeros(()), head))
    (total, dhead), dhidden = jax.lax.scan(body, start, _chunks(hidden_BTD, targets_BT, head_VD))
    dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[2])
    # First the reduction that leaves each device its own columns, then those columns over the other axes.
    dhead_VD = jax.lax.psum_scatter(dhead.weight, axes.width, scatter_dimension=1, tiled=True)
    dhead_VD = jax.lax.psum(dhead_VD, tuple(axis for axis in axes.rows if axis not in axes.width))
    dbias_V = None if dhead.bias is None else jax.lax.psum(dhead.bias, axes.rows)
    dhead = Head(dhead_VD, dbias_V, head.spec)
    return (
        jax.lax.psum(total, axes.rows),
        dhidden[:, : hidden_BTD.shape[1]],
        jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), dhead, own),
    )


def _gathered(head_VD: jax.Array, dtype: Any, axes: _Axes) -> jax.Array:
    """This device's part of the vocabulary in the whole width."""
    return jax.lax.all_gather(head_VD.astype(dtype), axes.width, axis=1, tiled=True)


def _chunks(hidden_BTD: jax.Array, targets_BT: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(chunks, B, …) of hidden and targets, as few and as even as `_LOGITS_PER_CHUNK` allows."""
    batch, length = targets_BT.shape
    longest = max(1, min(length, _LOGITS_PER_CHUNK // (batch * head_VD.shape[0])))
    count = -(-length // longest)
    size = -(-length // count)
    missing = count * size - length

    def cut(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return cut(hidden_BTD, 0), cut(targets_BT, IGNORED)


class _Chunk(NamedTuple):
    """Summed loss of one chunk, and what its gradient is made of.

    Attributes:
        loss: (), over the whole vocabulary.
        logits: (B, chunk, V) of this device's part of the vocabulary.
        lse: (B, chunk), their logsumexp over the whole vocabulary.
        own_targets: (B, chunk), counted from the start of this device's part.
    """

    loss: jax.Array
    logits: jax.Array
    lse: jax.Array
    own_targets: jax.Array


def _chunk(hidden: jax.Array, targets: jax.Array, head: Head, axes: _Axes) -> _Chunk:
    logits = head.logits(hidden)
    highest = jax.lax.pmax(jnp.max(logits, axis=-1), axes.vocabulary)
    own_sum = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    own_targets = targets - head.weight.shape[0] * jax.lax.axis_index(axes.vocabulary)
    is_own = (own_targets >= 0) & (own_targets < head.weight.shape[0])
    picked = jnp.take_along_axis(logits, jnp.where(is_own, own_targets, 0)[..., None], axis=-1)[..., 0]
    whole_sum, target_logit = jax.lax.psum((own_sum, jnp.where(is_own, picked, 0.0)), axes.vocabulary)
    lse = highest + jnp.log(whole_sum)
    return _Chunk(jnp.sum(jnp.where(targets == IGNORED, 0.0, lse - target_logit)), logits, lse, own_targets)


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """E · Σ_e f_e · P_e per layer, averaged over layers; 1 when balanced, E when one expert takes all.

    f_e is expert e's share of all choices and P_e its mean probability (Switch Transformer, arXiv 2101.03961,
    eq. 4-6, with f normalised by K). Taken per layer, since pooling lets imbalances of layers cancel.

    Args:
        stats: with a leading axis over layers.
    """
    share_LE = stats.load / jnp.maximum(stats.load.sum(-1, keepdims=True), 1.0)
    mean_LE = stats.probability / jnp.maximum(stats.tokens, 1.0)[:, None]
    return jnp.mean(stats.load.shape[-1] * jnp.sum(share_LE * mean_LE, axis=-1))


def pooled_load_balancing_loss(stats: RouterStats) -> jax.Array:
    """The loss that transformers calls ``load_balancing_loss_func``: K when balanced, layers pooled.

    For parity only; `load_balancing_loss` is what training uses.
    """
    tokens = jnp.maximum(stats.tokens.sum(), 1.0)
    return stats.load.shape[-1] * jnp.sum(stats.top_load.sum(0) / tokens * stats.probability.sum(0) / tokens)


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean of logsumexp(logits)² over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.mean(stats.z / jnp.maximum(stats.tokens, 1.0))
