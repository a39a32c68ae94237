"""The one batch: of training, of evaluation and of whoever calls the model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

IGNORED = -1
"""A target that is not predicted."""


class Batch(NamedTuple):
    """Token ids, how they are packed, and what is to be learned of them.

    All are (B, T), or (micro-batches, B, T), of numpy on the host and of jax on devices.

    Attributes:
        tokens: int32.
        positions: int32, counted from 0 in every document.
        segment_ids: int32: documents of a row are numbered from 1, padding is 0; None when every row is one whole
            document.
        targets: int32, the token that each one predicts, `IGNORED` where none is; None where nobody asks.
        weights: float32, of each target in the loss, 0 where it is ignored.
    """

    tokens: Any
    positions: Any
    segment_ids: Any = None
    targets: Any = None
    weights: Any = None


def make_batch(
    tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> Batch:
    """A batch to call the model with; positions (B, T) are by default counted from the start of each segment."""
    if positions is None:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        positions = index
        if segment_ids is not None:
            positions = index - jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
    return Batch(tokens, positions, segment_ids)


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """(B, T) bool: another segment than the token before it, or the first of its row."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def learning_batch(
    tokens: np.ndarray,
    positions: np.ndarray,
    segment_ids: np.ndarray,
    targets: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Batch:
    """A batch to learn from, on the host: what is predicted, and how much it counts, is said here and nowhere else.

    Args:
        tokens, positions, segment_ids: (B, T) int32.
        targets: (B, T) int32; by default `next_token_targets`.
        weights: (B, T) float32; by default 1 for every target.
    """
    if targets is None:
        targets = next_token_targets(tokens, segment_ids)
    counted = (targets != IGNORED).astype(np.float32)
    return Batch(tokens, positions, segment_ids, targets, counted if weights is None else counted * weights)


def next_token_targets(tokens: Any, segment_ids: Any | None) -> Any:
    """Targets (B, T): the next token of the same document, `IGNORED` at its last token and on padding.

    Args:
        tokens: (B, T) int32, of numpy or jax.
        segment_ids: (B, T) int32 with 0 for padding, or None when every row is one document.
    """
    numpy = jnp if isinstance(tokens, jax.Array) else np
    following = numpy.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is None:
        return following
    next_segment = numpy.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return numpy.where((next_segment == segment_ids) & (segment_ids > 0), following, IGNORED)
