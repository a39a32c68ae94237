"""The order of token rows by expert, and their way back.

`Dispatch` is built once per layer. Slots are (token, choice) pairs, Z = R*K of them, ordered by expert. Rows go to
slots by a gather and back by sums of gathers: a scatter-add is neither deterministic nor fast on GPUs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.dropout import SlotDropout


class Dispatch(NamedTuple):
    """The order of slots by expert.

    Attributes:
        order: (Z,) int32: slot number, token * K + choice, at each place of the expert order.
        inverse: (R, K) int32: place of each slot in the expert order.
        group_sizes: (E,) int32: slots of each expert held here, in order. They may sum to less than Z: the
            slots after them belong to experts held elsewhere.
        dropout: of the inputs of low-rank updates, by the numbers of slots.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array
    dropout: SlotDropout | None = None


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
    local_Z = ((experts_RK.reshape(-1) - first) % num_experts).astype(jnp.int32)
    order = _stable_order(local_Z, num_experts)
    slot_Z = jnp.arange(order.size, dtype=jnp.int32)
    # A permutation's inverse needs no second sort: each place is written once.
    inverse = jnp.zeros_like(order).at[order].set(slot_Z, unique_indices=True, mode="promise_in_bounds")
    edges = jnp.searchsorted(local_Z[order], jnp.arange((held or num_experts) + 1)).astype(jnp.int32)
    return Dispatch(order, inverse.reshape(experts_RK.shape), jnp.diff(edges))


def _stable_order(experts_Z: jax.Array, num_experts: int) -> jax.Array:
    """(Z,) int32: slots by expert, those of one expert in their own order."""
    slots = experts_Z.size
    if num_experts * slots > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(experts_Z, stable=True).astype(jnp.int32)
    # Numbers alone are sorted several times as fast as pairs.
    return jnp.sort(experts_Z * slots + jnp.arange(slots, dtype=jnp.int32)) % slots


def gather_sum(y_ZD: jax.Array, dispatch: Dispatch, weights_RK: jax.Array | None = None) -> jax.Array:
    """Sum of each token's K slots, in float32 and always in the order of its choices; weighted if weights are given.

    Args:
        y_ZD: (Z, D) in expert order.
        dispatch: the order.
        weights_RK: (R, K).

    Returns:
        (R, D) in y's dtype.
    """
    weights_RK = None if weights_RK is None else weights_RK.astype(jnp.float32)
    total_RD: jax.Array | float = 0.0
    # One choice after the other is one pass over memory, without the (R, K, D) array between gather and sum.
    for choice, place_R in enumerate(dispatch.inverse.T):
        y_RD = y_ZD.at[place_R].get(mode="promise_in_bounds").astype(jnp.float32)
        total_RD += y_RD if weights_RK is None else weights_RK[:, choice, None] * y_RD
    return jnp.asarray(total_RD).astype(y_ZD.dtype)
