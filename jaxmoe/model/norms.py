"""Norms over the last axis."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.linear import add_bias, along_last, linear
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """A norm with a scale per feature.

    | kind | value |
    |---|---|
    | rms | x / sqrt(mean(x²) + eps), rounded to x's dtype, · scale (Zhang and Sennrich, arXiv 1910.07467) |
    | rms_float32 | the same, · scale in float32, then rounded |
    | rms_centred | the same, · (1 + scale) in float32, then rounded (Gemma, arXiv 2403.08295) |
    | layer | (x − mean) / sqrt(variance + eps) · scale (+ bias), all in float32 (Ba et al., arXiv 1607.06450) |

    Statistics are always taken in float32. When the scale multiplies matters in bfloat16 alone.

    Attributes:
        bias: of "layer".
        gate: A, where the norm y is multiplied by sigmoid(out_proj silu(in_proj y)), the latter of width A (A.X K2).
    """

    eps: float
    kind: Literal["rms", "rms_float32", "rms_centred", "layer"] = "rms"
    bias: bool = False
    gate: int | None = None

    @property
    def initial(self) -> Literal["ones", "zeros"]:
        """How a scale begins."""
        return "zeros" if self.kind == "rms_centred" else "ones"


def norm_params(name: str, spec: NormSpec, width: int) -> dict[str, Any]:
    """Declarations of the norm called `name`: its scale, and ``{name}_bias``; scale and gate together if it has one."""
    if spec.gate is not None:
        sizes = {"D": width, "A": spec.gate}
        scale = param("D", sizes, role="vector", init=spec.initial)
        return {name: {"scale": scale, "in_proj": param("AD", sizes), "out_proj": param("DA", sizes)}}
    declared = {name: param("D", {"D": width}, role="vector", init=spec.initial)}
    if spec.bias:
        declared[f"{name}_bias"] = param("D", {"D": width}, role="vector", init="zeros")
    return declared


def norm(params: Tree, name: str, spec: NormSpec, x: jax.Array) -> jax.Array:
    """The norm called `name` of x (..., D)."""
    if spec.gate is not None:
        own = params[name]
        normal = apply_norm(spec, x, own["scale"])
        gate = linear(jax.nn.silu(linear(normal, own["in_proj"])), own["out_proj"])
        return (normal * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(normal.dtype)
    return apply_norm(spec, x, params[name], params.get(f"{name}_bias"))


@functools.partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
def apply_norm(
    spec: NormSpec, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    """x (..., D), scale and bias (D,) → (..., D) in x's dtype; without a scale it is 1.

    The backward pass keeps x alone: computing its statistics again costs less than memory for the normal x.
    """
    wide = x.astype(jnp.float32)
    if spec.kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + spec.eps)
    if scale is None:
        return normal.astype(x.dtype)
    scale = along_last(scale, x)
    if spec.kind == "rms":
        return scale.astype(x.dtype) * normal.astype(x.dtype)
    wide_scale = scale.astype(jnp.float32)
    scaled = normal * (1 + wide_scale if spec.kind == "rms_centred" else wide_scale)
    return (scaled if bias is None else add_bias(scaled, bias.astype(jnp.float32))).astype(x.dtype)
