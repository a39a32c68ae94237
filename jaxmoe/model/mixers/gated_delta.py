"""Gated DeltaNet (Yang et al., arXiv 2412.06464), as Qwen3-Next has it."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.recurrent import Passage, RecurrentCache, RecurrentMixer
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class GatedDeltaSpec(RecurrentMixer):
    """out(silu(z) · norm(o)), with o read by queries from a state that forgets and writes over what keys find there.

    Queries, keys and values come from a projection and a convolution with SiLU; queries and keys have length 1,
    queries over sqrt(H). Of each head of values the decay is exp(−exp(decay) · softplus(a + step_bias)) and the rate
    sigmoid(b), a and b being projections too.

    Attributes:
        num_heads: N, of values.
        num_key_heads: M, of queries and keys, each for N/M neighbouring heads of values.
        key_dim: H.
        value_dim: V.
        taps: c, tokens that the convolution spans.
        norm: of every head of the output.
        by_key_head: the rows of one projection are, for each head of keys, its query, key, values and z, and those of
            another its b and a. Otherwise there is one of all queries, keys and values, and one each of z, b and a.
    """

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    taps: int
    norm: NormSpec
    by_key_head: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(N, H, V)."""
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def tail_shape(self) -> tuple[int, int]:
        """(c − 1, X)."""
        return self.taps - 1, sum(self._widths)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of all queries, keys and values."""
        keys = self.num_key_heads * self.key_dim
        return keys, keys, self.num_heads * self.value_dim

    def params(self, width: int) -> Tree:
        """{"delta": …}."""
        convolved, values = sum(self._widths), self._widths[2]
        sizes = {
            "D": width,
            "N": self.num_heads,
            "X": convolved,
            "P": values,
            "H": self.value_dim,
            "J": 1,
            "c": self.taps,
        }
        if self.by_key_head:
            declared = {
                "in_proj_qkvz": param("XD", sizes | {"X": convolved + values}),
                "in_proj_ba": param("XD", sizes | {"X": 2 * self.num_heads}),
            }
        else:
            declared = {
                "in_proj_qkv": param("XD", sizes),
                "in_proj_z": param("PD", sizes, num_heads=self.num_heads),
                "in_proj_b": param("ND", sizes),
                "in_proj_a": param("ND", sizes),
            }
        return {
            "delta": declared
            | {
                "convolution": param("XJc", sizes, role="convolution"),
                "decay": param("N", sizes, role="decay", init="zeros"),
                "step_bias": param("N", sizes, role="decay", init="ones"),
                "norm": param("H", sizes, role="vector", init=self.norm.initial),
                "out_proj": param("DP", sizes, num_heads=self.num_heads),
            }
        }

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        del context
        own, tokens = params["delta"], x_BTD.shape[:2]
        qkv_BTX, z_BTNV, b_BTN, a_BTN = self._projected(own, x_BTD)
        qkv_BTX, tail = passage.convolved(qkv_BTX, own["convolution"][:, 0])
        keys, both, _ = (sum(self._widths[:count]) for count in (1, 2, 3))
        q_BTMH, k_BTMH, v_BTNV = (
            part.reshape(*tokens, -1, head)
            for part, head in zip(
                jnp.split(qkv_BTX, (keys, both), axis=-1),
                (self.key_dim, self.key_dim, self.value_dim),
                strict=True,
            )
        )
        step_BTN = jax.nn.softplus(
            a_BTN.astype(jnp.float32) + own["step_bias"].astype(jnp.float32)[None, None]
        )
        log_decay_BTN = -jnp.exp(own["decay"].astype(jnp.float32))[None, None] * step_BTN
        out_BTNV, state = passage.recurred(
            unit(q_BTMH, self.key_dim**-0.5), unit(k_BTMH), v_BTNV, log_decay_BTN, jax.nn.sigmoid(b_BTN)
        )
        normal_BTNV = apply_norm(self.norm, out_BTNV.astype(x_BTD.dtype), own["norm"])
        gated_BTNV = normal_BTNV.astype(jnp.float32) * jax.nn.silu(z_BTNV.astype(jnp.float32))
        out_BTD = linear(gated_BTNV.astype(x_BTD.dtype).reshape(*tokens, -1), own["out_proj"])
        return out_BTD, RecurrentCache(state, tail)

    def _projected(self, own: Tree, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (B, T, X), z (B, T, N, V), b and a (B, T, N)."""
        tokens = x_BTD.shape[:2]
        if not self.by_key_head:
            z_BTP = linear(x_BTD, own["in_proj_z"])
            b_BTN, a_BTN = (linear(x_BTD, own[name]) for name in ("in_proj_b", "in_proj_a"))
            qkv_BTX = linear(x_BTD, own["in_proj_qkv"])
            return qkv_BTX, z_BTP.reshape(*tokens, self.num_heads, -1), b_BTN, a_BTN

        def of_key_heads(name: str, *widths: int) -> list[jax.Array]:
            """Parts of so many rows of each head, heads joined again."""
            all_BTMX = linear(x_BTD, own[name]).reshape(*tokens, self.num_key_heads, -1)
            ends = [sum(widths[: count + 1]) for count in range(len(widths) - 1)]
            return [part.reshape(*tokens, -1) for part in jnp.split(all_BTMX, ends, axis=-1)]

        heads = self.num_heads // self.num_key_heads
        values = heads * self.value_dim
        *qkv, z_BTP = of_key_heads("in_proj_qkvz", self.key_dim, self.key_dim, values, values)
        b_BTN, a_BTN = of_key_heads("in_proj_ba", heads, heads)
        return jnp.concatenate(qkv, axis=-1), z_BTP.reshape(*tokens, self.num_heads, -1), b_BTN, a_BTN

    def problems(self) -> Iterator[str]:
        """Heads that do not divide."""
        if self.num_heads % self.num_key_heads:
            yield (
                f"linear_num_value_heads {self.num_heads} is not divisible by linear_num_key_heads "
                f"{self.num_key_heads}"
            )

    def describe(self) -> str:
        """Heads and their widths."""
        return (
            f"Gated DeltaNet {self.num_heads}/{self.num_key_heads} heads of {self.value_dim}/{self.key_dim}"
        )

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "Gated DeltaNet"


def unit(x: jax.Array, scale: float = 1.0) -> jax.Array:
    """scale · x / sqrt(Σ x² + 1e-6) over the last axis, in float32."""

    def scaled(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return scale * wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)

    return jax.checkpoint(scaled, prevent_cse=False)(x)
