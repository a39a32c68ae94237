"""Expert layers to measure ours beside: written on another grouped product, and dense.

They take weights as (in, out), which is what those products are fastest with, and their gathers are written so that no
gradient is a scatter-add, which is slow on GPUs.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp import Activation, Experts
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, make_dispatch

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one layer: (R, D) tokens, experts with biases and LoRA if it has them, routing, the output's gradient."""

    x: jax.Array
    experts: Experts
    weights: jax.Array
    chosen: jax.Array
    dout: jax.Array


def ragged_dot(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    out = jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32)
    return out.astype(rows.dtype)


def tokamax_products() -> dict[str, Product]:
    """tokamax's backends for GPUs; none where it is not installed."""
    if importlib.util.find_spec("tokamax") is None:
        return {}
    import tokamax

    return {f"tokamax {name}": partial(_tokamax, tokamax.ragged_dot, name) for name in ("mosaic", "triton")}


def _tokamax(product: Any, name: str, rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    out = product(rows, weights, sizes, preferred_element_type=jnp.float32, implementation=name)
    return out.astype(rows.dtype)


def dense(rows: jax.Array, weights: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.dot(rows, weights[0], preferred_element_type=jnp.float32).astype(rows.dtype)


def turned(experts: Experts) -> Experts:
    """Matrices (E, out, in) → (E, in, out), the first one's parts side by side."""

    def turn(weights: jax.Array | None) -> jax.Array | None:
        if weights is None:
            return None
        return weights.reshape(weights.shape[0], -1, weights.shape[-1]).swapaxes(1, 2)

    bias = experts.gate_up_bias
    return Experts(
        turn(experts.gate_up),
        turn(experts.down),
        None if bias is None else bias.reshape(bias.shape[0], -1),
        experts.down_bias,
        jax.tree.map(turn, experts.lora),
    )


def layer(
    product: Product,
    activation: Activation,
    scale: float,
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    chosen: jax.Array,
) -> jax.Array:
    """The layer on a grouped product; `experts` are `turned`."""
    dispatch = make_dispatch(chosen, experts.down.shape[0])
    y_ZD = _experts(product, activation, scale, _to_slots(x, dispatch), experts, dispatch)
    y_RKD = _to_tokens(y_ZD, dispatch)
    return jnp.einsum("rkd,rk->rd", y_RKD, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def dense_layer(
    activation: Activation,
    scale: float,
    x_ZD: jax.Array,
    experts: Experts,
    weights: jax.Array,
    chosen: jax.Array,
) -> jax.Array:
    """All rows through one expert, no routing: the same operations."""
    del weights, chosen
    return _experts(dense, activation, scale, x_ZD, experts, None)


def _experts(
    product: Product,
    activation: Activation,
    scale: float,
    x_ZD: jax.Array,
    experts: Experts,
    dispatch: Dispatch | None,
) -> jax.Array:
    sizes = jnp.zeros(1, jnp.int32) if dispatch is None else dispatch.group_sizes
    expert_Z = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x_ZD.shape[0])
    lora = experts.lora

    def linear(rows: jax.Array, matrix: jax.Array, bias: Any, a: Any, b: Any) -> jax.Array:
        out = product(rows, matrix, sizes)
        if a is not None:
            out += product(product(rows, a, sizes), b * jnp.asarray(scale, b.dtype), sizes)
        return out if bias is None else out + bias[expert_Z]

    h = linear(x_ZD, experts.gate_up, experts.gate_up_bias, lora.gate_up_a, lora.gate_up_b)
    parts = jnp.split(h.astype(jnp.float32), activation.parts, axis=-1)
    a_ZF = activation.value(tuple(parts)).astype(x_ZD.dtype)
    return linear(a_ZF, experts.down, experts.down_bias, lora.down_a, lora.down_b)


@jax.custom_vjp
def _to_slots(x_RD: jax.Array, dispatch: Dispatch) -> jax.Array:
    return x_RD[dispatch.order // dispatch.inverse.shape[1]]


def _to_slots_forward(x_RD: jax.Array, dispatch: Dispatch) -> tuple[jax.Array, Dispatch]:
    return _to_slots(x_RD, dispatch), dispatch


def _to_slots_backward(dispatch: Dispatch, dx_ZD: jax.Array) -> tuple[jax.Array, None]:
    return dx_ZD[dispatch.inverse].astype(jnp.float32).sum(axis=1).astype(dx_ZD.dtype), None


@jax.custom_vjp
def _to_tokens(y_ZD: jax.Array, dispatch: Dispatch) -> jax.Array:
    return y_ZD[dispatch.inverse]


def _to_tokens_forward(y_ZD: jax.Array, dispatch: Dispatch) -> tuple[jax.Array, Dispatch]:
    return _to_tokens(y_ZD, dispatch), dispatch


def _to_tokens_backward(dispatch: Dispatch, dy_RKD: jax.Array) -> tuple[jax.Array, None]:
    return dy_RKD.reshape(-1, dy_RKD.shape[-1])[dispatch.order], None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)
_to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)
