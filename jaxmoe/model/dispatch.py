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
        group_sizes: (E,) int32: slots of each expert, in order. They may sum to less than Z: the slots
            after them belong to experts held elsewhere.
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


@jax.custom_vjp
def gather_to_experts(x_RD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """x (R, D) → its rows in expert order (Z, D)."""
    return x_RD[dispatch.order // dispatch.inverse.shape[1]]


def _gather_fwd(x_RD: jax.Array, dispatch: Dispatch) -> tuple[jax.Array, Dispatch]:
    return gather_to_experts(x_RD, dispatch), dispatch


def _gather_bwd(dispatch: Dispatch, grad_ZD: jax.Array) -> tuple[jax.Array, None]:
    return grad_ZD[dispatch.inverse].astype(jnp.float32).sum(axis=1).astype(grad_ZD.dtype), None


gather_to_experts.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine(y_ZD: jax.Array, weights_RK: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Weighted sum of each token's K expert outputs, in float32, choices always added in the same order.

    Args:
        y_ZD: (Z, D), expert outputs in expert order.
        weights_RK: (R, K).
        dispatch: the order.

    Returns:
        (R, D) in y's dtype.
    """
    y_RKD = y_ZD[dispatch.inverse].astype(jnp.float32)
    return jnp.einsum("rkd,rk->rd", y_RKD, weights_RK.astype(jnp.float32)).astype(y_ZD.dtype)


def _combine_fwd(
    y_ZD: jax.Array, weights_RK: jax.Array, dispatch: Dispatch
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Dispatch]]:
    return combine(y_ZD, weights_RK, dispatch), (y_ZD, weights_RK, dispatch)


def _combine_bwd(
    saved: tuple[jax.Array, jax.Array, Dispatch], grad_RD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y_ZD, weights_RK, dispatch = saved
    grad = grad_RD.astype(jnp.float32)
    grad_ZD = grad[dispatch.order // weights_RK.shape[1]]
    dy_ZD = grad_ZD * weights_RK.reshape(-1)[dispatch.order].astype(jnp.float32)[:, None]
    dweights_Z = jnp.sum(grad_ZD * y_ZD.astype(jnp.float32), axis=-1)
    return dy_ZD.astype(y_ZD.dtype), dweights_Z[dispatch.inverse].astype(weights_RK.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)
