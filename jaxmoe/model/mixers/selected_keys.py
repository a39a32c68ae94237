"""Which keys a query sees, where it does not see all: one bit for each, eight of them in a byte."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

KEYS = 8
"""Of a byte."""


class IndexerStats(NamedTuple):
    """Sums over the valid tokens of all layers with an indexer so far, in float32.

    Attributes:
        divergence: (), of what attention weighs keys with from what the indexer does, in nats.
        tokens: ().
    """

    divergence: jax.Array
    tokens: jax.Array

    def add(self, divergences_BT: jax.Array, valid_BT: jax.Array | None) -> "IndexerStats":
        """With those of one more layer."""
        counts_BT = jnp.ones_like(divergences_BT) if valid_BT is None else valid_BT.astype(jnp.float32)
        return IndexerStats(
            self.divergence + jnp.sum(divergences_BT * counts_BT), self.tokens + jnp.sum(counts_BT)
        )


class Selection(NamedTuple):
    """What layers that select keys leave to those after them.

    Attributes:
        keys: (B, T, bytes) uint8, which keys a query sees; None for all.
        stats: of the indexers; None where nobody asks for them.
    """

    keys: Any = None
    stats: IndexerStats | None = None


def packed_keys(seen_BTS: Bool[Array, "B T S"]) -> UInt8[Array, "B T bytes"]:
    """Bits of booleans; the last byte is filled up with false."""
    return jnp.packbits(seen_BTS, axis=-1, bitorder="little")


def unpacked_keys(selected_BTs: UInt8[Array, "B T bytes"]) -> Bool[Array, "B T S"]:
    """Booleans of bits, of the filling as well."""
    return jnp.unpackbits(selected_BTs, axis=-1, bitorder="little").astype(jnp.bool_)


def highest(
    scores_BTS: Float[Array, "B T S"], visible_BTS: Bool[Array, "B T S"], count: int
) -> Bool[Array, "B T S"]:
    """The `count` visible keys with the highest scores, of equal ones the first; all of them where they are fewer."""
    scores_BTS = jnp.where(visible_BTS, scores_BTS, -jnp.inf)
    chosen_BTk = jax.lax.top_k(scores_BTS, count)[1]
    none_BTS = jnp.zeros(scores_BTS.shape, jnp.bool_)
    return jnp.put_along_axis(none_BTS, chosen_BTk, True, axis=-1, inplace=False) & visible_BTS


def visible_keys(
    places_BT: Int[Array, "B T"],
    length: int,
    documents_BT: Int[Array, "B T"] | None = None,
    documents_BS: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Of keys at places 0 … length − 1 those that are not later than the query and are of its document."""
    visible_BTS = jnp.arange(length, dtype=jnp.int32)[None, None] <= places_BT[:, :, None]
    if documents_BT is None or documents_BS is None:
        return visible_BTS
    return visible_BTS & (documents_BS[:, None] == documents_BT[:, :, None])
