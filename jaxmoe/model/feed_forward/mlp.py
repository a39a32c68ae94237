"""Dense feed-forward."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """down(activation(gate(x), up(x))) with hidden width I; also what every token of a MoE layer goes through.

    Attributes:
        bias: on all of its matrices.
    """

    hidden: int
    activation: Activation = Activation()
    bias: bool = False


def mlp_params(spec: MLPSpec, width: int) -> dict[str, Param]:
    """Declarations of one dense feed-forward for a model of `width`."""
    sizes = {"D": width, "I": spec.hidden, "G": spec.activation.parts}
    declared = {"gate_up": param("GID", sizes), "down": param("DI", sizes)}
    if spec.bias:
        declared["gate_up_bias"] = param("GI", sizes, role="vector", init="zeros")
        declared["down_bias"] = param("D", sizes, role="vector", init="zeros")
    return declared


def mlp(params: Tree, spec: MLPSpec, x: jax.Array) -> jax.Array:
    """x (..., D) → (..., D)."""

    def part(index: int) -> jax.Array:
        out = jnp.einsum("...d,id->...i", x, params["gate_up"][index])
        return out + params["gate_up_bias"][index] if spec.bias else out

    hidden = spec.activation.value(tuple(part(index) for index in range(spec.activation.parts)))
    out = jnp.einsum("...i,di->...d", hidden, params["down"])
    return out + params["down_bias"] if spec.bias else out
