"""What the experts of a layer mean, in plain jnp. Every backend is tested against this one and its gradients."""

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.dropout import SlotDropout, factors
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
    dropout: SlotDropout | None = None,
) -> jax.Array:
    """See `jaxmoe.kernels.expert_mlp.expert_mlp`. Sends every token through every expert."""
    lora = experts.lora
    held_E = jnp.arange(experts.down.shape[0])
    is_chosen_RKE = chosen_RK[:, :, None] - first == held_E[None, None, :]

    def dropped(x_ER: jax.Array, key: jax.Array | None) -> jax.Array:
        if dropout is None or key is None:
            return x_ER
        slots = jnp.arange(chosen_RK.size, dtype=jnp.int32)
        of_slots = factors(key, slots, x_ER.shape[-1], dropout.rate).reshape(*chosen_RK.shape, -1)
        return x_ER * jnp.einsum("rke,rkd->erd", is_chosen_RKE.astype(x_ER.dtype), of_slots)

    up_key, down_key = (None, None) if dropout is None else (dropout.up, dropout.down)
    pre_EGRF = jnp.einsum("rd,egfd->egrf", x_RD, experts.gate_up)
    if lora.gate_up_a is not None and lora.gate_up_b is not None:
        x_ERD = dropped(jnp.broadcast_to(x_RD[None], (held_E.size, *x_RD.shape)), up_key)
        low_ERr = jnp.einsum("erd,eld->erl", x_ERD, lora.gate_up_a)
        pre_EGRF += lora_scale * jnp.einsum("erl,egfl->egrf", low_ERr, lora.gate_up_b)
    if experts.gate_up_bias is not None:
        pre_EGRF += experts.gate_up_bias[:, :, None, :]
    a_ERF = activation.value(tuple(pre_EGRF[:, part] for part in range(activation.parts)))
    y_ERD = jnp.einsum("erf,edf->erd", a_ERF, experts.down)
    if lora.down_a is not None and lora.down_b is not None:
        low_ERr = jnp.einsum("erf,elf->erl", dropped(a_ERF, down_key), lora.down_a)
        y_ERD += lora_scale * jnp.einsum("erl,edl->erd", low_ERr, lora.down_b)
    if experts.down_bias is not None:
        y_ERD += experts.down_bias[:, None, :]
    weight_RE = jnp.sum(jnp.where(is_chosen_RKE, weights_RK[:, :, None], 0), axis=1)
    return jnp.einsum("re,erd->rd", weight_RE, y_ERD).astype(x_RD.dtype)
