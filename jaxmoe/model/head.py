"""The output head: hidden states to logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.model.linear import in_dtype, linear


@dataclasses.dataclass(frozen=True)
class LogitSpec:
    """What becomes of hidden · weightᵀ + bias: a factor, then cap · tanh(… / cap) where there is a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def value(self, raw: jax.Array) -> jax.Array:
        """The logits."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * jnp.tanh(scaled / self.softcap)

    def cotangent(self, logits: jax.Array, dlogits: jax.Array) -> jax.Array:
        """That of hidden · weightᵀ + bias, from that of the logits."""
        if self.softcap is not None:
            dlogits = dlogits * (1 - (logits / self.softcap) ** 2)
        return dlogits if self.scale == 1.0 else dlogits * self.scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "bias"), meta_fields=("spec",))
@dataclasses.dataclass(frozen=True)
class Head:
    """The output head, or its gradients.

    Attributes:
        weight: (V, D), any weight of `jaxmoe.model.linear`.
        bias: (V,), or None where there is none.
    """

    weight: Any
    bias: Any = None
    spec: LogitSpec = LogitSpec()

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """(B, T, V) in float32; the weight is multiplied in hidden's dtype."""
        weight_VD = in_dtype(self.weight, hidden_BTD.dtype)
        bias = None if self.bias is None else self.bias.astype(jnp.float32)
        return self.spec.value(linear(hidden_BTD, weight_VD, bias, out_dtype=jnp.float32))
