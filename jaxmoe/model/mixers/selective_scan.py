"""A state per channel whose decay differs from number to number: Mamba's selective scan (arXiv 2312.00752).

Every channel x has a state of Y numbers, zero where a document begins, and with steps dt, rates r > 0, keys k and
queries q

    S_t[x, y] = exp(−r[x, y] dt_t[x]) S_{t-1}[x, y] + dt_t[x] k_t[y] u_t[x]        o_t[x] = Σ_y q_t[y] S_t[x, y]

Decays that differ within a channel leave no products of matrices: a chunk of tokens is a parallel prefix instead, of
pairs (a, b) that stand for S → a S + b, and only the state goes from chunk to chunk.

Letters of this module: Z chunks of C tokens. Tokens come first, so that neither scan cuts an array.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.parallel.sharding import constrain

CHUNK = 64
"""Tokens of a chunk, whose states are in memory at once: more of them would cost more memory, fewer more scans."""


def selective_scan(
    x_BTX: Float[Array, "B T X"],
    step_BTX: Float[Array, "B T X"],
    key_BTY: Float[Array, "B T Y"],
    query_BTY: Float[Array, "B T Y"],
    rate_XY: Float[Array, "X Y"],
    *,
    documents_BT: Int[Array, "B T"] | None = None,
    state_BXY: Float[Array, "B X Y"] | None = None,
) -> tuple[Float[Array, "B T X"], Float[Array, "B X Y"]]:
    """The recurrence over tokens, in float32. The backward pass keeps operands and computes one chunk after the other.

    Args:
        x_BTX: u.
        step_BTX: dt, at least 0.
        key_BTY, query_BTY: of all channels.
        rate_XY: r.
        documents_BT: another number where another document begins; None where a row is one.
        state_BXY: before the first token, of its document; None for zeros.

    Returns:
        What is read, (B, T, X) float32, and the state after the last token.
    """
    batch, length, channels = x_BTX.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())

    def chunks(x_BT: jax.Array) -> jax.Array:
        """(B, T, …) → (Z, C, B, …). What the last chunk lacks neither decays the state nor writes to it."""
        missing = ((0, 0), (0, -length % size), *((0, 0),) * (x_BT.ndim - 2))
        x_TB = jnp.pad(x_BT, missing).swapaxes(0, 1)
        return x_TB.reshape(-1, size, *x_TB.shape[1:])

    if state_BXY is None:
        state_BXY = jnp.zeros((batch, channels, rate_XY.shape[1]), jnp.float32)
    starts_ZCB = None
    if documents_BT is not None:
        earlier_BT = jnp.pad(
            documents_BT[:, :-1], ((0, 0), (1, 0)), mode="edge"
        )  # the state is the first one's
        earlier_BT = jnp.where(jnp.arange(length)[None] == 0, documents_BT, earlier_BT)
        starts_ZCB = chunks(documents_BT != earlier_BT)
    operands = (constrain(x_BTX, "BTX"), constrain(step_BTX, "BTX"), key_BTY, query_BTY)
    out_ZCBX, state_BXY = _over_chunks(*map(chunks, operands), starts_ZCB, rate_XY, state_BXY)
    out_BTX = out_ZCBX.reshape(-1, batch, channels)[:length].swapaxes(0, 1)
    return constrain(out_BTX, "BTX"), state_BXY


@functools.partial(jax.checkpoint, prevent_cse=False)
def _over_chunks(
    x_ZCBX: jax.Array,
    step_ZCBX: jax.Array,
    key_ZCBY: jax.Array,
    query_ZCBY: jax.Array,
    starts_ZCB: jax.Array | None,
    rate_XY: jax.Array,
    state_BXY: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    rate_XY = rate_XY.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(state_BXY: jax.Array, chunk: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        x_CBX, step_CBX, key_CBY, query_CBY = (part.astype(jnp.float32) for part in chunk[:4])
        kept_CBXY = jnp.exp(-rate_XY[None, None] * step_CBX[..., None])
        if chunk[4] is not None:
            kept_CBXY = jnp.where(chunk[4][..., None, None], 0.0, kept_CBXY)
        added_CBXY = (step_CBX * x_CBX)[..., None] * key_CBY[:, :, None]
        kept_CBXY, added_CBXY = jax.lax.associative_scan(_then, (kept_CBXY, added_CBXY))
        states_CBXY = kept_CBXY * state_BXY[None] + added_CBXY
        return states_CBXY[-1], jnp.einsum("cbxy,cby->cbx", states_CBXY, query_CBY)

    state_BXY, out_ZCBX = jax.lax.scan(one, state_BXY, (x_ZCBX, step_ZCBX, key_ZCBY, query_ZCBY, starts_ZCB))
    return out_ZCBX, state_BXY


def _then(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """S → a S + b of the first, and then of the second."""
    return first[0] * second[0], second[0] * first[1] + second[1]
