"""What every layer needs of the batch, made once and passed to all of them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.devices import Device
from jaxmoe.model.batch import Batch, segment_starts
from jaxmoe.model.mixers.rope import RopeSpec, rope_tables
from jaxmoe.model.mixers.selected_keys import Selection


@dataclasses.dataclass(frozen=True)
class Context:
    """Of one batch, and in a layer of that layer.

    Attributes:
        positions: (B, T) int32, counted from 0 in every document.
        segment_ids: (B, T) int32: documents of a row are numbered from 1, padding is 0; None when every row is one
            whole document.
        packed: documents share rows. False says that each row holds one, from its start, and then padding.
        rotations: cos and sin tables of every rotation that a layer has.
        key: PRNG key of the layer, in training; None means that nothing is random.
        dropout: share that low-rank pairs drop of their inputs, where there is a key.
        device: that computes; None for the one at hand.
        fresh: the tokens begin their texts. False says that a cache has what comes before them.
        layer: () int32, number of the layer in the model, from 0.
        selection: the keys that a layer of sparse attention sees, as the last layer that selects any has left it.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    packed: bool
    rotations: Mapping[RopeSpec, tuple[jax.Array, jax.Array]]
    key: jax.Array | None = None
    device: Device | None = None
    dropout: float = 0.0
    fresh: bool = True
    layer: jax.Array | int = 0
    selection: Selection = dataclasses.field(default_factory=Selection)

    @property
    def valid(self) -> jax.Array | None:
        """(B, T) bool, false on padding; None where there is none."""
        return None if self.segment_ids is None else self.segment_ids > 0

    @property
    def documents(self) -> jax.Array | None:
        """`segment_ids` for attention; None where causality alone keeps documents apart."""
        return self.segment_ids if self.packed else None

    @property
    def starts(self) -> jax.Array:
        """(B, T) bool, true on the first token of every document and of padding.

        What carries a state from token to token begins anew there, also where attention does without a mask.
        """
        if self.segment_ids is None:
            return jnp.broadcast_to(jnp.arange(self.positions.shape[1])[None] == 0, self.positions.shape)
        return segment_starts(self.segment_ids)


def make_context(
    rotations: Iterable[RopeSpec],
    batch: Batch,
    dtype: Any,
    *,
    packed: bool = True,
    key: jax.Array | None = None,
    device: Device | None = None,
    fresh: bool = True,
    length: jax.Array | int | None = None,
) -> Context:
    """Prepare a batch for all layers.

    Args:
        rotations: of all layers.
        batch: token ids and how they are packed.
        dtype: compute dtype.
        packed, key, device, fresh: see `Context`.
        length: () int32, tokens of the longest text; by default up to the last of the positions.
    """
    tables = {spec: rope_tables(spec, batch.positions, dtype, length) for spec in rotations}
    return Context(batch.positions, batch.segment_ids, packed, tables, key, device, fresh=fresh)
