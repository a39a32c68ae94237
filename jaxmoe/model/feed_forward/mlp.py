"""Dense feed-forward."""

import dataclasses
from collections.abc import Iterator

import jax

from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.blocks import FeedForward
from jaxmoe.model.linear import linear, part
from jaxmoe.model.mixers.context import Context
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class MLPSpec(FeedForward):
    """down(activation(gate(x), up(x))) with hidden width I; also what every token of a MoE layer goes through.

    Attributes:
        bias: on all of its matrices.
    """

    hidden: int
    activation: Activation = Activation()
    bias: bool = False

    def params(self, width: int) -> Tree:
        """{"mlp": …}."""
        return {"mlp": mlp_params(self, width)}

    def apply(
        self, params: Tree, x_BTD: jax.Array, stream_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, None]:
        """x (B, T, D) → (B, T, D)."""
        del stream_BTD, context
        return mlp(params["mlp"], self, x_BTD), None

    def describe(self) -> str:
        """The hidden width."""
        return f"dense {self.hidden}"

    def traits(self) -> Iterator[str]:
        """That it is dense."""
        yield "dense layers"


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

    def half(index: int) -> jax.Array:
        bias = params["gate_up_bias"][index] if spec.bias else None
        return linear(x, part(params["gate_up"], index), bias)

    hidden = spec.activation.value(tuple(half(index) for index in range(spec.activation.parts)))
    return linear(hidden, params["down"], params["down_bias"] if spec.bias else None)
