"""Mamba 2 (Dao and Gu, arXiv 2405.21060), as Nemotron-H and Granite 4 have it."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.recurrent import Passage, RecurrentCache, RecurrentMixer
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class Mamba2Spec(RecurrentMixer):
    """out(norm(silu(z) · (y + skip · x))), with y read by queries C of a state that forgets and adds dt · x at keys B.

    One projection gives z, x, B, C and dt, in this order; x, B and C go through a convolution with SiLU. Of each head
    dt becomes softplus(dt + step_bias), between the least and the most step, and the decay exp(−exp(decay) · dt).

    Steps have these bounds on whole texts and one token at a time alike. transformers has them on whole texts alone.

    Attributes:
        num_heads: N.
        num_groups: M, of queries and keys, each for N/M neighbouring heads.
        head_dim: V.
        state_size: H, the width of queries and keys.
        taps: c, tokens that the convolution spans.
        norm: of the output, over the heads of each group by themselves.
        convolution_bias: a bias on every channel of the convolution.
        least_step, most_step: of dt.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    state_size: int
    taps: int
    norm: NormSpec
    convolution_bias: bool = True
    least_step: float = 0.0
    most_step: float = math.inf

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(N, H, V)."""
        return self.num_heads, self.state_size, self.head_dim

    @property
    def tail_shape(self) -> tuple[int, int]:
        """(c − 1, X)."""
        return self.taps - 1, sum(self._convolved)

    @property
    def _convolved(self) -> tuple[int, int, int]:
        """Widths of x, B and C."""
        keys = self.num_groups * self.state_size
        return self.num_heads * self.head_dim, keys, keys

    def params(self, width: int) -> Tree:
        """{"mamba": …}."""
        inner, convolved = self._convolved[0], sum(self._convolved)
        sizes = {"D": width, "N": self.num_heads, "X": convolved, "P": inner, "J": 1, "c": self.taps}
        declared = {
            "in_proj": param("XD", sizes | {"X": inner + convolved + self.num_heads}),
            "convolution": param("XJc", sizes, role="convolution"),
            "decay": param("N", sizes, role="decay", init="zeros"),
            "step_bias": param("N", sizes, role="decay", init="ones"),
            "skip": param("N", sizes, role="vector", init="ones"),
            "norm": param("P", sizes, role="vector", init=self.norm.initial),
            "out_proj": param("DP", sizes, num_heads=self.num_heads),
        }
        if self.convolution_bias:
            declared["convolution_bias"] = param("X", sizes, role="vector", init="zeros")
        return {"mamba": declared}

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        del context
        own, tokens = params["mamba"], x_BTD.shape[:2]
        inner, keys, _ = self._convolved
        z_BTP, wide_BTX, dt_BTN = jnp.split(
            linear(x_BTD, own["in_proj"]), (inner, inner + sum(self._convolved)), axis=-1
        )
        wide_BTX, tail = passage.convolved(wide_BTX, own["convolution"][:, 0], own.get("convolution_bias"))
        x_BTP, k_BTX, q_BTX = jnp.split(wide_BTX, (inner, inner + keys), axis=-1)
        x_BTNV = x_BTP.reshape(*tokens, self.num_heads, self.head_dim)
        q_BTMH, k_BTMH = (part.reshape(*tokens, self.num_groups, self.state_size) for part in (q_BTX, k_BTX))
        step_BTN = jax.nn.softplus(
            dt_BTN.astype(jnp.float32) + own["step_bias"].astype(jnp.float32)[None, None]
        )
        step_BTN = jnp.clip(step_BTN, self.least_step, self.most_step)
        log_decay_BTN = -jnp.exp(own["decay"].astype(jnp.float32))[None, None] * step_BTN
        added_BTNV = step_BTN[..., None] * x_BTNV.astype(jnp.float32)
        read_BTNV, state = passage.recurred(q_BTMH, k_BTMH, added_BTNV, log_decay_BTN)
        out_BTP = self._gated(read_BTNV, x_BTNV, z_BTP, own["skip"], own["norm"])
        return linear(out_BTP, own["out_proj"]), RecurrentCache(state, tail)

    @functools.partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
    def _gated(
        self,
        read_BTNV: Float[Array, "B T N V"],
        x_BTNV: Float[Array, "B T N V"],
        z_BTP: Float[Array, "B T P"],
        skip_N: Float[Array, "N"],
        norm_P: Float[Array, "P"],
    ) -> Float[Array, "B T P"]:
        """norm(silu(z) · (read + skip · x)) in float32, in z's dtype. The backward pass keeps the operands alone."""
        skipped_BTNV = skip_N.astype(jnp.float32)[None, None, :, None] * x_BTNV.astype(jnp.float32)
        gated_BTP = (read_BTNV + skipped_BTNV).reshape(z_BTP.shape) * jax.nn.silu(z_BTP.astype(jnp.float32))
        groups = (*z_BTP.shape[:2], self.num_groups, -1)
        normal_BTP = apply_norm(self.norm, gated_BTP.reshape(groups), None).reshape(z_BTP.shape)
        return (norm_P.astype(jnp.float32)[None, None] * normal_BTP).astype(z_BTP.dtype)

    def problems(self) -> Iterator[str]:
        """Heads that do not divide."""
        if self.num_heads % self.num_groups:
            yield f"Mamba's {self.num_heads} heads are not divisible by its {self.num_groups} groups"

    def describe(self) -> str:
        """Heads, their width, and their state's."""
        groups = f" in {self.num_groups} groups" if self.num_groups > 1 else ""
        return f"Mamba 2 {self.num_heads} heads of {self.head_dim}{groups}, state {self.state_size}"

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "Mamba 2"
