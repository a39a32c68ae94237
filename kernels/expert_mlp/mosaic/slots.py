"""Slots laid out in row tiles, each of one expert: what the GPU kernels work on.

Every group of slots is padded to whole tiles, so that no tile crosses a group and every store is of a whole tile.
Padding repeats a token of its own group and weighs nothing, so whatever it computes reaches no other expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.dispatch import Dispatch


class Slots(NamedTuple):
    """p = t * tile padded slots, of which the first `num_tiles` tiles are in use.

    Attributes:
        token: (p,) int32, row of x of each padded slot.
        weight: (p,) float32, the router's weight; zero for padding.
        tile_expert: (t,) int32, expert of each tile.
        num_tiles: (1,) int32.
        first_tile: (E,) int32, of each expert.
        expert_tiles: (E,) int32, tiles of each expert; none for one without slots.
        inverse: (R, K) int32, padded slot of each choice; p for experts held elsewhere.
    """

    token: jax.Array
    weight: jax.Array
    tile_expert: jax.Array
    num_tiles: jax.Array
    first_tile: jax.Array
    expert_tiles: jax.Array
    inverse: jax.Array


def max_tiles(slots: int, groups: int, tile: int) -> int:
    """t, enough tiles for any group sizes that sum to `slots`."""
    return max(1, min(slots, (slots + groups * (tile - 1)) // tile))


def make_slots(dispatch: Dispatch, weights_RK: jax.Array, tile: int) -> Slots:
    """Lay out `dispatch` in tiles of `tile` rows.

    Args:
        dispatch: the order of slots.
        weights_RK: (R, K), the router's weights.
        tile: rows of a tile.
    """
    sizes_E, order_Z = dispatch.group_sizes, dispatch.order
    slots, top_k = order_Z.shape[0], dispatch.inverse.shape[1]
    tiles = max_tiles(slots, sizes_E.shape[0], tile)
    tiles_E = (sizes_E + tile - 1) // tile
    last_tile_E, last_slot_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    first_tile_E, first_slot_E = last_tile_E - tiles_E, last_slot_E - sizes_E
    expert_t = jnp.searchsorted(last_tile_E, jnp.arange(tiles), side="right").astype(jnp.int32)
    expert_t = jnp.minimum(expert_t, sizes_E.shape[0] - 1)
    within_t = (jnp.arange(tiles) - first_tile_E[expert_t]) * tile
    place_p = ((first_slot_E[expert_t] + within_t)[:, None] + jnp.arange(tile)[None, :]).reshape(-1)
    end_p = jnp.repeat(last_slot_E[expert_t], tile)
    slot_p = order_Z[jnp.clip(jnp.minimum(place_p, end_p - 1), 0, slots - 1)]
    weight_p = jnp.where(place_p < end_p, weights_RK.reshape(-1)[slot_p].astype(jnp.float32), 0.0)
    # Place in the expert order → padded place: the padding before its group comes on top.
    expert_RK = jnp.searchsorted(last_slot_E, dispatch.inverse, side="right")
    held_RK = expert_RK < sizes_E.shape[0]
    expert_RK = jnp.minimum(expert_RK, sizes_E.shape[0] - 1)
    padded_RK = dispatch.inverse + (first_tile_E * tile - first_slot_E)[expert_RK]
    return Slots(
        token=(slot_p // top_k).astype(jnp.int32),
        weight=weight_p,
        tile_expert=expert_t,
        num_tiles=last_tile_E[-1:].astype(jnp.int32),
        first_tile=first_tile_E.astype(jnp.int32),
        expert_tiles=tiles_E.astype(jnp.int32),
        inverse=jnp.where(held_RK, padded_RK, tiles * tile).astype(jnp.int32),
    )


def sum_choices(y_pD: jax.Array, slots: Slots, weights_RK: jax.Array | None = None) -> jax.Array:
    """Sum of each token's padded slots, in float32 and in the order of its choices: (R, D) in y's dtype.

    A gather and a sum: no atomics and no scatter-add, so it is deterministic.
    """
    y_RKD = y_pD.at[slots.inverse].get(mode="fill", fill_value=0).astype(jnp.float32)
    if weights_RK is not None:
        y_RKD = y_RKD * weights_RK.astype(jnp.float32)[:, :, None]
    return y_RKD.sum(axis=1).astype(y_pD.dtype)
