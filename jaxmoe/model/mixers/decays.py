"""What is left of what a state was told, chunk by chunk: one decay per head, or one per channel of its keys.

Every exponent is a sum of decays, none of a difference of sums and none above 0: however fast a state decays, nothing
overflows, and what is far below 1 rounds to 0 as it should. Letters are those of `recurrence`.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Decays:
    """Of all chunks, from 0 to 1; 0 across the border of a document.

    Attributes:
        log_ZBMRCY: ln of a token's decay, Y being H channels, or 1 for all of them.
        seen_ZBIJ: whether token I reads what J wrote: I is no earlier, and of the same document.
        before_ZBMRCY: of the chunk's first state when a token reads it.
        after_ZBMRCY: of what a token wrote in the chunk's last state.
        whole_ZBMRY: of the chunk's first state in its last one.
    """

    log_ZBMRCY: jax.Array
    seen_ZBIJ: jax.Array
    before_ZBMRCY: jax.Array
    after_ZBMRCY: jax.Array
    whole_ZBMRY: jax.Array

    def products(self, q_ZBMCH: jax.Array, k_ZBMCH: jax.Array) -> jax.Array:
        """(Z, B, M, R, I, J): Σ_h q_ih k_jh · what is left at I of what J wrote; 0 where I does not see J."""
        if self.log_ZBMRCY.shape[-1] == 1:
            return jnp.einsum("zbmih,zbmjh->zbmij", q_ZBMCH, k_ZBMCH)[:, :, :, None] * self._between_ZBMRIJ
        q_ZBMRCH, k_ZBMRCH = (x[:, :, :, None] for x in (q_ZBMCH, k_ZBMCH))
        return jnp.where(
            self.seen_ZBIJ[:, :, None, None], _by_halves(q_ZBMRCH, k_ZBMRCH, self.log_ZBMRCY), 0.0
        )

    @property
    def _between_ZBMRIJ(self) -> jax.Array:
        log_ZBMRC = self.log_ZBMRCY[..., 0]
        size = log_ZBMRC.shape[-1]
        later = jnp.tril(jnp.ones((size, size), bool), -1)[None, None, None, None]
        sums_ZBMRIJ = jnp.cumsum(jnp.where(later, log_ZBMRC[..., :, None], 0.0), axis=-2)
        return jnp.exp(jnp.where(self.seen_ZBIJ[:, :, None, None], sums_ZBMRIJ, -jnp.inf))


def decays_of(log_ZBMRCY: jax.Array, documents_ZBC: jax.Array | None) -> Decays:
    """`Decays` of chunks.

    Args:
        log_ZBMRCY: (Z, B, M, R, C, 1 or H), at most 0.
        documents_ZBC: another number where another document begins; None where a row is one.
    """
    size = log_ZBMRCY.shape[-2]
    seen_ZBIJ = jnp.tril(jnp.ones((size, size), bool))[None, None]
    before_ZBMRCY = jnp.exp(jnp.cumsum(log_ZBMRCY, axis=-2))
    after_ZBMRCY = jnp.exp(_sum_of_later(log_ZBMRCY))
    if documents_ZBC is not None:
        seen_ZBIJ = seen_ZBIJ & (documents_ZBC[..., :, None] == documents_ZBC[..., None, :])
        last_ZB1 = documents_ZBC[..., -1:]
        # The first state of all is of the first document, or zero.
        first_ZB1 = jnp.concatenate([documents_ZBC[:1, :, :1], last_ZB1[:-1]])
        of_first, of_last = (
            (documents_ZBC == document)[:, :, None, None, :, None] for document in (first_ZB1, last_ZB1)
        )
        before_ZBMRCY = jnp.where(of_first, before_ZBMRCY, 0.0)
        after_ZBMRCY = jnp.where(of_last, after_ZBMRCY, 0.0)
    return Decays(log_ZBMRCY, seen_ZBIJ, before_ZBMRCY, after_ZBMRCY, before_ZBMRCY[..., -1, :])


def _by_halves(q_ZBMRCH: jax.Array, k_ZBMRCH: jax.Array, log_ZBMRCH: jax.Array) -> jax.Array:
    """Σ_h q_ih k_jh · exp of what is summed of h after J up to I, for J ≤ I of a chunk; 0 elsewhere.

    Tokens of the second half of a block see those of its first half across the border between: what J wrote decays up
    to there, and from there on until I reads it. Each half is such a block again. All are products of matrices, and
    decays of channels in between are never made for every pair of tokens.
    """
    size = log_ZBMRCH.shape[-2]
    products = jnp.sum(q_ZBMRCH * k_ZBMRCH, axis=-1)
    products = jnp.broadcast_to(products, log_ZBMRCH.shape[:-1])[..., None, None]
    half = 1
    while half < size:

        def halves(x: jax.Array, half: int = half) -> tuple[jax.Array, jax.Array]:
            x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
            return x[..., 0, :, :], x[..., 1, :, :]

        until, since = halves(log_ZBMRCH)
        written = halves(k_ZBMRCH)[0] * jnp.exp(_sum_of_later(until))
        reading = halves(q_ZBMRCH)[1] * jnp.exp(jnp.cumsum(since, axis=-2))
        across = jnp.einsum("...ih,...jh->...ij", reading, written)
        first, second = products[..., 0::2, :, :], products[..., 1::2, :, :]
        left = jnp.concatenate([first, across], axis=-2)
        right = jnp.concatenate([jnp.zeros_like(second), second], axis=-2)
        products = jnp.concatenate([left, right], axis=-1)
        half *= 2
    return products[..., 0, :, :]


def _sum_of_later(x_CY: jax.Array) -> jax.Array:
    """(…, C, Y) → for each C the sum of those after it."""
    later = jnp.flip(jnp.cumsum(jnp.flip(x_CY[..., 1:, :], axis=-2), axis=-2), axis=-2)
    return jnp.concatenate([later, jnp.zeros_like(x_CY[..., :1, :])], axis=-2)
