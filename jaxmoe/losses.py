"""Losses: next-token cross-entropy without ever holding all logits, and the router's balance terms."""

import functools

import jax
import jax.numpy as jnp

from jaxmoe.model.router import RouterStats

IGNORED = -1
"""A target that is not predicted."""

_LOGITS_PER_CHUNK = 2**26
"""Logits held at once, in elements over all devices' batch rows: 256 MiB in float32 on one device."""


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


def linear_cross_entropy(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Sum of -log softmax(hidden · headᵀ)[target], in nats, over all targets that are not `IGNORED`.

    The sequence is cut into chunks and only one chunk's logits exist at a time. When a gradient is asked for,
    it is computed in the same pass (softmax minus one-hot needs nothing from later), so that the logits are
    never computed twice; the idea is that of Liger's fused linear cross-entropy (arXiv 2410.10989).

    Args:
        hidden_BTD: (B, T, D).
        head_VD: (V, D); multiplied in hidden's dtype, its gradient is summed in float32 and has head's own.
        targets_BT: (B, T) int32.

    Returns:
        () float32.
    """
    chunk = max(1, min(hidden_BTD.shape[1], _LOGITS_PER_CHUNK // (hidden_BTD.shape[0] * head_VD.shape[0])))
    return _chunked(hidden_BTD, head_VD, targets_BT, chunk)


def _chunks(x: jax.Array, chunk: int, fill: int) -> jax.Array:
    """(B, T, …) → (chunks, B, chunk, …), padded at the end of T with `fill`."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _chunk_nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed loss of one chunk; logits and their logsumexp for whoever wants the gradient."""
    logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets == IGNORED, 0.0, lse - target_logit)), logits, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    def body(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _chunk_nll(piece[0], head, piece[1])[0], None

    pieces = (_chunks(hidden, chunk, 0), _chunks(targets, chunk, IGNORED))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), pieces)[0]


def _chunked_fwd(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def body(
        carry: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (total, dhead), (hidden, targets) = carry, piece
        nll, logits, lse = _chunk_nll(hidden, head, targets)
        one_hot = targets[..., None] == jnp.arange(head.shape[0])
        dlogits = jnp.where(targets[..., None] == IGNORED, 0.0, jnp.exp(logits - lse[..., None]) - one_hot)
        dlogits = dlogits.astype(hidden.dtype)
        dhead += jnp.einsum("btv,btd->vd", dlogits, hidden, preferred_element_type=jnp.float32)
        return (total + nll, dhead), jnp.einsum("btv,vd->btd", dlogits, head.astype(hidden.dtype))

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, dhead), dhidden = jax.lax.scan(
        body, start, (_chunks(hidden, chunk, 0), _chunks(targets, chunk, IGNORED))
    )
    dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    return total, (dhidden, dhead.astype(head.dtype))


def _chunked_bwd(
    chunk: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    del chunk
    dhidden, dhead = saved
    return (grad * dhidden).astype(dhidden.dtype), (grad * dhead).astype(dhead.dtype), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


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
    return stats.load.shape[-1] * jnp.sum(stats.load.sum(0) / tokens * stats.probability.sum(0) / tokens)


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean of logsumexp(logits)² over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.mean(stats.z / jnp.maximum(stats.tokens, 1.0))
