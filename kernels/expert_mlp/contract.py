"""What the public function and its backends say to each other."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxmoe.kernels.devices import Device
from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.operands import Experts


@dataclasses.dataclass(frozen=True)
class Options:
    """What is no array and the same in the forward and the backward pass.

    Attributes:
        activation: between the two matrices.
        lora_scale: factor of the low-rank updates.
        device: what the layer is to run on.
    """

    activation: Activation
    lora_scale: float
    device: Device


class Grads(NamedTuple):
    """One entry for each differentiable operand: its gradient, or whether it is wanted (a bool, false for None)."""

    x: Any
    weights: Any
    experts: Experts


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Decided:
    """Decided in the forward pass, needed in the backward pass: the backend, and which gradients are wanted."""

    backend: str
    wanted: Grads


class OtherDevice(NotImplementedError):
    """A backend is for another kind of device: nothing that the user could mend."""
