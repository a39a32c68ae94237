"""What the experts of a layer mean, in plain jnp. Every backend is tested against this one and its gradients."""

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.operands import Experts


def expert_mlp(
    x_RD: jax.Array,
    experts: Experts,
    chosen_RK: jax.Array,
    weights_RK: jax.Array,
    *,
    activation: Activation,
    lora_scale: float = 1.0,
    first: jax.Array | int = 0,
) -> jax.Array:
    """See `jaxmoe.kernels.expert_mlp.expert_mlp`. Sends every token through every expert."""
    lora = experts.lora
    pre_EGRF = jnp.einsum("rd,egfd->egrf", x_RD, experts.gate_up)
    if lora.gate_up_a is not None and lora.gate_up_b is not None:
        low_ERr = jnp.einsum("rd,eld->erl", x_RD, lora.gate_up_a)
        pre_EGRF += lora_scale * jnp.einsum("erl,egfl->egrf", low_ERr, lora.gate_up_b)
    if experts.gate_up_bias is not None:
        pre_EGRF += experts.gate_up_bias[:, :, None, :]
    a_ERF = activation.value(tuple(pre_EGRF[:, part] for part in range(activation.parts)))
    y_ERD = jnp.einsum("erf,edf->erd", a_ERF, experts.down)
    if lora.down_a is not None and lora.down_b is not None:
        low_ERr = jnp.einsum("erf,elf->erl", a_ERF, lora.down_a)
        y_ERD += lora_scale * jnp.einsum("erl,edl->erd", low_ERr, lora.down_b)
    if experts.down_bias is not None:
        y_ERD += experts.down_bias[:, None, :]
    held_E = jnp.arange(experts.down.shape[0])
    is_chosen_RKE = chosen_RK[:, :, None] - first == held_E[None, None, :]
    weight_RE = jnp.sum(jnp.where(is_chosen_RKE, weights_RK[:, :, None], 0), axis=1)
    return jnp.einsum("re,erd->rd", weight_RE, y_ERD).astype(x_RD.dtype)
