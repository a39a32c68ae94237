"""The experts of a mixture-of-experts layer: dispatch, gated feed-forward, combine; forward, backward, LoRA."""

from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.api import expert_mlp
from jaxmoe.kernels.expert_mlp.dropout import SlotDropout
from jaxmoe.kernels.expert_mlp.operands import Experts, Lora

__all__ = ["Activation", "Experts", "Lora", "SlotDropout", "expert_mlp"]
