"""The portable backend: every step a plain XLA operation or the portable grouped matmul. Takes everything."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import Dispatch, gather_sum, slot_weights, to_slots
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora
from jaxmoe.kernels.grouped_matmul import matmul, weight_gradient


def forward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    *,
    save: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer's output (R, D), and with `save` the pre-activation (Z, f) that `backward` wants."""
    sizes = dispatch.group_sizes
    pre_Zf = _up(options, to_slots(x_RD, dispatch), experts, dispatch)
    a_ZF = options.activation.value(_parts(options, pre_Zf)).astype(x_RD.dtype)
    y_ZD = _with_lora(options, a_ZF, experts.down, *_down_lora(experts), sizes)
    if experts.down_bias is not None:
        y_ZD += _per_slot(experts.down_bias, dispatch)
    return gather_sum(y_ZD, dispatch, weights_RK), pre_Zf if save else None


def backward(
    options: Options,
    x_RD: jax.Array,
    experts: Experts,
    weights_RK: jax.Array,
    dispatch: Dispatch,
    pre_Zf: jax.Array,
    dout_RD: jax.Array,
    wanted: Grads,
) -> Grads:
    """Gradients of whatever is true in `wanted`; None for the rest."""
    dtype, sizes = x_RD.dtype, dispatch.group_sizes
    dout_ZD = to_slots(dout_RD, dispatch)
    weight_Z = slot_weights(weights_RK, dispatch)
    down_a, down_b = _down_lora(experts)
    # Not yet times the router's weight: the product with the activation is the gradient of that weight.
    dlow_Zr: Any = None
    if down_b is not None:
        dlow_Zr = matmul(dout_ZD, _scaled(down_b, options), sizes, transpose=True)
    plus = None if down_a is None else (dlow_Zr, down_a)
    da_ZF = matmul(dout_ZD, experts.down, sizes, transpose=True, plus=plus).astype(jnp.float32)
    a_ZF, dpre_parts = options.activation.value_and_grad(_parts(options, pre_Zf), weight_Z[:, None] * da_ZF)
    dpre_Zf = jnp.concatenate(dpre_parts, axis=-1).astype(dtype)
    # The router's weight goes with the narrower side of the outer products.
    weighted_ZF = (weight_Z[:, None] * a_ZF).astype(dtype)

    dweights_RK = None
    if wanted.weights:
        dweights_Z = jnp.sum(da_ZF * a_ZF, axis=-1)
        if experts.down_bias is not None:
            dweights_Z += jnp.sum(
                dout_ZD.astype(jnp.float32) * _per_slot(experts.down_bias, dispatch), axis=-1
            )
        dweights_RK = dweights_Z[dispatch.inverse].astype(weights_RK.dtype)
    dx_RD = None
    gate_up = experts.gate_up.reshape(experts.gate_up.shape[0], -1, experts.gate_up.shape[-1])
    up_a, up_b = _up_lora(experts)
    dlow_up_Zr: Any = None
    if up_a is not None and up_b is not None:
        dlow_up_Zr = matmul(dpre_Zf, _scaled(up_b, options), sizes, transpose=True)
    if wanted.x:
        plus = None if up_a is None else (dlow_up_Zr, up_a)
        dx_RD = gather_sum(matmul(dpre_Zf, gate_up, sizes, transpose=True, plus=plus), dispatch)

    def outer(columns: jax.Array, rows: jax.Array, like: jax.Array) -> jax.Array:
        return weight_gradient(columns, rows, sizes).reshape(like.shape)

    want, lora_want = wanted.experts, wanted.experts.lora
    x_ZD = to_slots(x_RD, dispatch)
    ones_Z1 = jnp.ones((x_ZD.shape[0], 1), dtype)
    lora: dict[str, Any] = {}
    if lora_want.gate_up_a:
        lora["gate_up_a"] = outer(x_ZD, dlow_up_Zr, up_a)
    if lora_want.gate_up_b:
        low_Zr = matmul(x_ZD, up_a, sizes, transpose=False) * jnp.asarray(options.lora_scale, dtype)
        lora["gate_up_b"] = outer(low_Zr, dpre_Zf, experts.lora.gate_up_b)
    if lora_want.down_a:
        weighted_dlow_Zr = (weight_Z[:, None] * dlow_Zr).astype(dtype)
        lora["down_a"] = outer(a_ZF.astype(dtype), weighted_dlow_Zr, down_a)
    if lora_want.down_b:
        low_Zr = matmul(weighted_ZF, down_a, sizes, transpose=False) * jnp.asarray(options.lora_scale, dtype)
        lora["down_b"] = outer(low_Zr, dout_ZD, down_b)
    return Grads(
        x=dx_RD,
        weights=dweights_RK,
        experts=Experts(
            gate_up=outer(x_ZD, dpre_Zf, experts.gate_up) if want.gate_up else None,
            down=outer(weighted_ZF, dout_ZD, experts.down) if want.down else None,
            gate_up_bias=outer(ones_Z1, dpre_Zf, experts.gate_up_bias) if want.gate_up_bias else None,
            down_bias=outer(weight_Z[:, None].astype(dtype), dout_ZD, experts.down_bias)
            if want.down_bias
            else None,
            lora=Lora(**lora),
        ),
    )


def _up(options: Options, x_ZD: jax.Array, experts: Experts, dispatch: Dispatch) -> jax.Array:
    """The pre-activation (Z, f), parts one after the other."""
    gate_up = experts.gate_up.reshape(experts.gate_up.shape[0], -1, experts.gate_up.shape[-1])
    pre_Zf = _with_lora(options, x_ZD, gate_up, *_up_lora(experts), dispatch.group_sizes)
    if experts.gate_up_bias is not None:
        pre_Zf += _per_slot(experts.gate_up_bias.reshape(gate_up.shape[:2]), dispatch)
    return pre_Zf


def _with_lora(
    options: Options,
    x: jax.Array,
    weights: jax.Array,
    a: jax.Array | None,
    b: jax.Array | None,
    sizes: jax.Array,
) -> jax.Array:
    plus = None
    if a is not None and b is not None:
        plus = (matmul(x, a, sizes, transpose=False), _scaled(b, options))
    return matmul(x, weights, sizes, transpose=False, plus=plus)


def _scaled(b: jax.Array, options: Options) -> jax.Array:
    return b * jnp.asarray(options.lora_scale, b.dtype)


def _up_lora(experts: Experts) -> tuple[Any, Any]:
    """A (E, r, D) and B (E, f, r)."""
    a, b = experts.lora.gate_up_a, experts.lora.gate_up_b
    return a, None if b is None else b.reshape(b.shape[0], -1, b.shape[-1])


def _down_lora(experts: Experts) -> tuple[Any, Any]:
    return experts.lora.down_a, experts.lora.down_b


def _parts(options: Options, pre_Zf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(pre_Zf.astype(jnp.float32), options.activation.parts, axis=-1))


def _per_slot(bias_En: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Each slot's expert's bias (Z, n); zero for slots of experts held elsewhere."""
    ends_E = jnp.cumsum(dispatch.group_sizes)
    slot_Z = jnp.arange(dispatch.order.shape[0])
    expert_Z = jnp.searchsorted(ends_E, slot_Z, side="right")
    return jnp.where((slot_Z < ends_E[-1])[:, None], bias_En[jnp.minimum(expert_Z, bias_En.shape[0] - 1)], 0)
