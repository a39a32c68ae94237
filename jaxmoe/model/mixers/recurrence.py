"""A state that decays and is written to, chunk by chunk: what recurrent mixers share.

Every head has a state S (H, V) that is zero where a document begins, and with decays a, keys k, values v and queries q

    S_t = a_t S_{t-1} + k_t u_tᵀ        o_t = S_tᵀ q_t

where u is v (linear attention with a decay: arXiv 2401.04658; Mamba 2: arXiv 2405.21060) or, with a rate b, what the
state does not yet say of it (the gated delta rule: arXiv 2412.06464)

    u_t = b_t (v_t − (a_t S_{t-1})ᵀ k_t)

A decay is a number, or one for each of the H channels (Kimi Delta Attention: arXiv 2510.26692).

Within a chunk all of that is matrix products of whole chunks, and only the state goes from chunk to chunk.

Letters of this module: Z chunks of C tokens (I and J where one looks at another), M heads of queries and keys, R heads
of values for each of these, N all heads of values, H width of a key, V of a value, Y decays of a head, 1 or H. Chunks
come first, so that the scan over them cuts no array.
"""

import functools
import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from jaxmoe.model.mixers.decays import Decays, decays_of
from jaxmoe.parallel.sharding import axis_size, constrain

CHUNK = 64
"""Tokens of a chunk: products of 64 rows fill a tensor core, and pairs of tokens cost less than what a state does."""

_BLOCK = 16
"""Side of the blocks on the diagonal that are inverted first, the smallest that a tensor core multiplies."""


def recur(
    q_BTMH: Float[Array, "B T M H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTNV: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N H"],
    *,
    rate_BTN: Float[Array, "B T N"] | None = None,
    documents_BT: Int[Array, "B T"] | None = None,
    state_BNHV: Float[Array, "B N H V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """The recurrence over tokens, in float32. The backward pass keeps the operands alone and computes chunks again.

    Args:
        q_BTMH, k_BTMH: queries and keys; M divides N, and neighbouring heads of values share one.
        v_BTNV: values.
        log_decay: ln a, at most 0, of heads or of their channels.
        rate_BTN: b of the delta rule; None without it.
        documents_BT: another number where another document begins; None where a row is one.
        state_BNHV: before the first token, of its document; None for zeros.

    Returns:
        What is read, (B, T, N, V) float32, and the state after the last token.
    """
    length, of_keys = k_BTMH.shape[1:3]
    batch, heads, values = v_BTNV.shape[0], *v_BTNV.shape[2:]
    # Each device needs the keys of its own heads: where several have heads that share some, they get a copy each.
    copies = math.lcm(of_keys, axis_size("tensor")) // of_keys
    if copies > 1:
        q_BTMH, k_BTMH = (jnp.repeat(x, copies, axis=2) for x in (q_BTMH, k_BTMH))
    size = min(CHUNK, 1 << (length - 1).bit_length())

    def chunks(x_BT: jax.Array, pattern: str) -> jax.Array:
        # What the last chunk lacks neither decays the state nor writes to it.
        missing = ((0, 0), (0, -length % size), *((0, 0),) * (x_BT.ndim - 2))
        return einops.rearrange(jnp.pad(x_BT, missing), pattern, c=size, m=of_keys * copies)

    keys, of_values = "b (z c) m h -> z b m c h", "b (z c) (m r) y -> z b m r c y"
    log_decay_BTNY = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    if state_BNHV is None:
        state_BNHV = jnp.zeros((batch, heads, q_BTMH.shape[-1], values), jnp.float32)
    if documents_BT is not None:
        missing = ((0, 0), (0, -length % size))
        documents_BT = jnp.pad(documents_BT, missing, mode="edge").reshape(batch, -1, size).swapaxes(0, 1)
    out_ZBMRCV, state_BMRHV = _over_chunks(
        chunks(constrain(q_BTMH, "BTMH"), keys),
        chunks(constrain(k_BTMH, "BTMH"), keys),
        chunks(constrain(v_BTNV, "BTN."), of_values),
        chunks(constrain(log_decay_BTNY.astype(jnp.float32), "BTN."), of_values),
        None if rate_BTN is None else chunks(rate_BTN.astype(jnp.float32)[..., None], of_values)[..., 0],
        documents_BT,
        einops.rearrange(state_BNHV, "b (m r) h v -> b m r h v", m=of_keys * copies),
    )
    out_BTNV = einops.rearrange(out_ZBMRCV, "z b m r c v -> b (z c) (m r) v")[:, :length]
    return constrain(out_BTNV, "BTN."), state_BMRHV.reshape(state_BNHV.shape)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _over_chunks(
    q_ZBMCH: jax.Array,
    k_ZBMCH: jax.Array,
    v_ZBMRCV: jax.Array,
    log_decay_ZBMRCY: jax.Array,
    rate_ZBMRC: jax.Array | None,
    documents_ZBC: jax.Array | None,
    state_BMRHV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    q_ZBMCH, k_ZBMCH, v_ZBMRCV = (x.astype(jnp.float32) for x in (q_ZBMCH, k_ZBMCH, v_ZBMRCV))
    decays = decays_of(log_decay_ZBMRCY, documents_ZBC)
    if rate_ZBMRC is None:
        written_ZBMRCV, read_ZBMRCH = v_ZBMRCV, None
    else:
        written_ZBMRCV, read_ZBMRCH = _corrections(k_ZBMCH, v_ZBMRCV, rate_ZBMRC, decays)

    kept_ZBMRCH = decays.after_ZBMRCY * k_ZBMCH[:, :, :, None]
    added_ZBMRHV = jnp.einsum("zbmrch,zbmrcv->zbmrhv", kept_ZBMRCH, written_ZBMRCV)
    removed_ZBMRHG = None
    if read_ZBMRCH is not None:
        removed_ZBMRHG = jnp.einsum("zbmrch,zbmrcg->zbmrhg", kept_ZBMRCH, read_ZBMRCH)

    # The one loop there is has one product in it: on a GPU what counts is how many kernels a turn starts.
    def step(state_BMRHV: jax.Array, chunk: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        whole_BMRY, added_BMRHV, removed_BMRHG = chunk
        next_BMRHV = whole_BMRY[..., None] * state_BMRHV + added_BMRHV
        if removed_BMRHG is not None:
            next_BMRHV -= jnp.einsum("bmrhg,bmrgv->bmrhv", removed_BMRHG, state_BMRHV)
        return next_BMRHV, state_BMRHV

    chunks = (decays.whole_ZBMRY, added_ZBMRHV, removed_ZBMRHG)
    last_BMRHV, states_ZBMRHV = jax.lax.scan(step, state_BMRHV, chunks)
    if read_ZBMRCH is not None:
        written_ZBMRCV -= jnp.einsum("zbmrch,zbmrhv->zbmrcv", read_ZBMRCH, states_ZBMRHV)
    within_ZBMRCV = jnp.einsum("zbmrij,zbmrjv->zbmriv", decays.products(q_ZBMCH, k_ZBMCH), written_ZBMRCV)
    reading_ZBMRCH = decays.before_ZBMRCY * q_ZBMCH[:, :, :, None]
    return within_ZBMRCV + jnp.einsum("zbmrch,zbmrhv->zbmrcv", reading_ZBMRCH, states_ZBMRHV), last_BMRHV


def _corrections(
    k_ZBMCH: jax.Array, v_ZBMRCV: jax.Array, rate_ZBMRC: jax.Array, decays: Decays
) -> tuple[jax.Array, jax.Array]:
    """U and W with which a chunk writes U − W S, for S before it: the WY form of the delta rule's products.

    With L_ij = b_i k_i · (what is left at i of) k_j below the diagonal, (I + L) u = b (v − (before S) k) for all tokens
    of a chunk at once (arXiv 2412.06464, section 3.3).
    """
    lower_ZBMRIJ = rate_ZBMRC[..., None] * decays.products(k_ZBMCH, k_ZBMCH)
    inverse_ZBMRIJ = unit_inverse(lower_ZBMRIJ) * rate_ZBMRC[..., None, :]
    reading_ZBMRCH = decays.before_ZBMRCY * k_ZBMCH[:, :, :, None]
    return (
        jnp.einsum("zbmrij,zbmrjv->zbmriv", inverse_ZBMRIJ, v_ZBMRCV),
        jnp.einsum("zbmrij,zbmrjh->zbmrih", inverse_ZBMRIJ, reading_ZBMRCH),
    )


@jax.custom_vjp
def unit_inverse(lower: Float[Array, "*batch c c"]) -> Float[Array, "*batch c c"]:
    """(I + L)⁻¹ of what is below the diagonal of `lower`, of a side that is a power of two.

    By halves: [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ B A⁻¹, D⁻¹]], which is as exact as substitution and all products of
    matrices. A sum of powers of L would be as well, and cancels where keys are alike.
    """
    size = lower.shape[-1]
    block = min(size, _BLOCK)
    places = jnp.arange(block)
    diagonal = _on_diagonal(lower, block)
    product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)
    leading = (None,) * (diagonal.ndim - 2)
    inverse = jnp.broadcast_to(jnp.eye(block)[leading], diagonal.shape)
    half = 1
    while half < block:
        # The lower left quarters of blocks of twice that side; what is inverted has nothing there yet.
        pair, is_second = places // (2 * half), places // half % 2 == 1
        quarter = (pair[:, None] == pair[None]) & is_second[:, None] & ~is_second[None]
        quarters = jnp.where(quarter[leading], diagonal, 0.0)
        inverse = inverse - (quarters if half == 1 else product(product(inverse, quarters), inverse))
        half *= 2
    while half < size:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        quarters = _on_diagonal(lower, 2 * half)[..., half:, :half]
        left = jnp.concatenate([first, -product(product(second, quarters), first)], axis=-2)
        right = jnp.concatenate([jnp.zeros_like(second), second], axis=-2)
        inverse = jnp.concatenate([left, right], axis=-1)
        half *= 2
    return inverse[..., 0, :, :]


def _unit_inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_inverse(lower)
    return inverse, inverse


def _unit_inverse_backward(inverse: jax.Array, d_inverse: jax.Array) -> tuple[jax.Array]:
    product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)
    return (jnp.tril(-product(product(inverse.mT, d_inverse), inverse.mT), -1),)


unit_inverse.defvjp(_unit_inverse_forward, _unit_inverse_backward)


def _on_diagonal(x: jax.Array, side: int) -> jax.Array:
    """(…, c, c) → the blocks on its diagonal, (…, c / side, side, side)."""
    starts = range(0, x.shape[-1], side)
    return jnp.stack([x[..., at : at + side, at : at + side] for at in starts], axis=-3)
