"""Dense gated feed-forward (SwiGLU, Shazeer, arXiv 2002.05202)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """down(silu(gate(x)) · up(x)) with hidden width I."""

    hidden: int


def mlp_params(spec: MLPSpec, width: int) -> Tree:
    """Declarations of one dense feed-forward for a model of `width`."""
    sizes = {"D": width, "I": spec.hidden, "G": 2}
    return {"gate_up": param("GID", sizes), "down": param("DI", sizes)}


def mlp(params: Tree, x_BTD: jax.Array) -> jax.Array:
    """x (B, T, D) → (B, T, D)."""
    gate_BTI = jnp.einsum("btd,id->bti", x_BTD, params["gate_up"][0])
    up_BTI = jnp.einsum("btd,id->bti", x_BTD, params["gate_up"][1])
    return jnp.einsum("bti,di->btd", jax.nn.silu(gate_BTI) * up_BTI, params["down"])
