"""Activations of an expert: what stands between its first and its second matrix."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

ALPHA = 1.702
"""Slope of the sigmoid in "swiglu_clamped"."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """What an expert does to its pre-activation.

    | name | value of gate g and up u |
    |---|---|
    | silu | g · sigmoid(g) · u (SwiGLU, Shazeer, arXiv 2002.05202) |
    | gelu_tanh | gelu(g) · u, with the tanh approximation of gelu |
    | swiglu_clamped | (clip(u, ±limit) + 1) · g' · sigmoid(1.702 g'), g' = min(g, limit) (gpt-oss) |
    | relu2 | max(u, 0)², no gate |

    Attributes:
        limit: of "swiglu_clamped".
    """

    name: Literal["silu", "gelu_tanh", "swiglu_clamped", "relu2"] = "silu"
    limit: float = 7.0

    @property
    def parts(self) -> int:
        """G: 2 for gate and up, 1 without a gate."""
        return 1 if self.name == "relu2" else 2

    def value(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """The activation of (gate, up), or of (up,) alone. Elementwise, in the dtype of its inputs."""
        if self.name == "relu2":
            positive = jnp.maximum(parts[0], 0)
            return positive * positive
        gate, up = parts
        if self.name == "silu":
            return gate * jax.nn.sigmoid(gate) * up
        if self.name == "gelu_tanh":
            return 0.5 * gate * (1 + jnp.tanh(_gelu_argument(gate))) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)

    def value_and_grad(
        self, parts: tuple[jax.Array, ...], cotangent: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The activation, and the cotangent of each part. Written out, so that a kernel can run it.

        Where a clamp is active its derivative is zero; at the clamp itself that of the inside is taken.
        """
        if self.name == "relu2":
            positive = jnp.maximum(parts[0], 0)
            return positive * positive, (2 * positive * cotangent,)
        gate, up = parts
        if self.name == "silu":
            sigmoid = jax.nn.sigmoid(gate)
            swish = gate * sigmoid
            return swish * up, (cotangent * up * (sigmoid + swish * (1 - sigmoid)), cotangent * swish)
        if self.name == "gelu_tanh":
            tanh = jnp.tanh(_gelu_argument(gate))
            half = 0.5 * (1 + tanh)
            slope = half + 0.5 * gate * (1 - tanh * tanh) * _gelu_argument_slope(gate)
            return half * gate * up, (cotangent * up * slope, cotangent * half * gate)
        inside_gate, inside_up = gate <= self.limit, jnp.abs(up) <= self.limit
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        sigmoid = jax.nn.sigmoid(ALPHA * gate)
        swish = gate * sigmoid
        slope = sigmoid + ALPHA * swish * (1 - sigmoid)
        return (up + 1) * swish, (
            jnp.where(inside_gate, cotangent * (up + 1) * slope, 0),
            jnp.where(inside_up, cotangent * swish, 0),
        )


_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


def _gelu_argument(x: jax.Array) -> jax.Array:
    return _SQRT_2_OVER_PI * (x + _CUBIC * x * x * x)


def _gelu_argument_slope(x: jax.Array) -> jax.Array:
    return _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * x * x)
