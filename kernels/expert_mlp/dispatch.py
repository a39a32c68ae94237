"""Moving token rows to experts and back.

`Dispatch` is built once per layer. Slots are (token, choice) pairs, Z = R*K of them, ordered by expert; the
two moves are each other's transpose, written so that neither direction needs a scatter-add, which is neither
deterministic nor fast on GPUs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dispatch(NamedTuple):
    """The order of slots by expert.

    Attributes:
        order: (Z,) int32: slot number, token * K + choice, at each place of the expert order.
        inverse: (R, K) int32: place of each slot in the expert order.
        group_sizes: (E,) int32: slots of each expert held here, in order. They may sum to less than Z: the
            slots after them belong to experts held elsewhere.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def make_dispatch(
    experts_RK: jax.Array, num_experts: int, first: jax.Array | int = 0, held: int | None = None
) -> Dispatch:
    """Order the slots of `experts_RK` (R, K) by expert, stably.

    Args:
        experts_RK: chosen experts.
        num_experts: E of the whole layer.
        first: the first expert held here (expert parallelism); its slots come first.
        held: how many consecutive experts are held here; all by default.
    """
    local_Z = (experts_RK.reshape(-1) - first) % num_experts
    order = jnp.argsort(local_Z, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32).reshape(experts_RK.shape)
    edges = jnp.searchsorted(local_Z[order], jnp.arange((held or num_experts) + 1)).astype(jnp.int32)
    return Dispatch(order, inverse, jnp.diff(edges))


def to_slots(x_RD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """x (R, D) → its rows in expert order (Z, D)."""
    return x_RD[dispatch.order // dispatch.inverse.shape[1]]


def slot_weights(weights_RK: jax.Array, dispatch: Dispatch) -> jax.Array:
    """The router's weights in expert order, (Z,) float32."""
    return weights_RK.reshape(-1)[dispatch.order].astype(jnp.float32)


def gather_sum(y_ZD: jax.Array, dispatch: Dispatch, weights_RK: jax.Array | None = None) -> jax.Array:
    """Sum of each token's K slots, in float32 and always in the order of its choices; weighted if weights are given.

    Args:
        y_ZD: (Z, D) in expert order.
        dispatch: the order.
        weights_RK: (R, K).

    Returns:
        (R, D) in y's dtype.
    """
    y_RKD = y_ZD[dispatch.inverse].astype(jnp.float32)
    if weights_RK is None:
        return y_RKD.sum(axis=1).astype(y_ZD.dtype)
    return jnp.einsum("rkd,rk->rd", y_RKD, weights_RK.astype(jnp.float32)).astype(y_ZD.dtype)
