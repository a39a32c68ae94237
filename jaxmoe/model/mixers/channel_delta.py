"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay for every channel of a head."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.gated_delta import unit
from jaxmoe.model.mixers.recurrent import Passage, RecurrentCache, RecurrentMixer
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class ChannelDeltaSpec(RecurrentMixer):
    """o(sigmoid(g x) · norm(o)), with o read by queries from a state that forgets and writes over what keys find there.

    Queries, keys and values come from a projection and a convolution with SiLU; queries and keys have length 1,
    queries over sqrt(H). The decay of a channel is exp(−exp(decay) · softplus(f x + step_bias)), with one number
    `decay` for a head, and the rate of a head sigmoid(b x).

    Attributes:
        num_heads: N.
        head_dim: H, also of values.
        taps: c, tokens that the convolution spans.
        norm: of every head of the output.
        narrow_gates: f and g are products of two matrices, H wide between. Otherwise each is one.
        least_log: the decay is exp(least_log · sigmoid(exp(decay) · (f x + step_bias))) instead, none below
            exp(least_log); None without that bound.
        float32: convolution and `decay` are kept in float32, as `step_bias` always is.
    """

    num_heads: int
    head_dim: int
    taps: int
    norm: NormSpec
    narrow_gates: bool = True
    least_log: float | None = None
    float32: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(N, H, H)."""
        return self.num_heads, self.head_dim, self.head_dim

    @property
    def tail_shape(self) -> tuple[int, int]:
        """(c − 1, X)."""
        return self.taps - 1, 3 * self.num_heads * self.head_dim

    def params(self, width: int) -> Tree:
        """{"delta": …}."""
        attended = self.num_heads * self.head_dim
        sizes = {
            "D": width,
            "N": self.num_heads,
            "H": self.head_dim,
            "A": self.head_dim,
            "X": 3 * attended,
            "J": 1,
            "c": self.taps,
        } | dict.fromkeys("QUP", attended)

        def of_heads(dims: str) -> Param:
            return param(dims, sizes, num_heads=self.num_heads)

        if self.narrow_gates:
            gates = {
                "f_a_proj": param("AD", sizes),
                "f_b_proj": of_heads("QA"),
                "g_a_proj": param("AD", sizes),
                "g_b_proj": of_heads("PA"),
            }
        else:
            gates = {"f_proj": of_heads("QD"), "g_proj": of_heads("PD")}
        return {
            "delta": gates
            | {
                "q_proj": of_heads("QD"),
                "k_proj": of_heads("UD"),
                "v_proj": of_heads("PD"),
                "convolution": param("XJc", sizes, role="convolution", float32=self.float32),
                "decay": param("N", sizes, role="decay", init="zeros", float32=self.float32),
                "step_bias": param("Q", sizes, role="decay", init="ones", float32=True),
                "b_proj": param("ND", sizes),
                "norm": param("H", sizes, role="vector", init=self.norm.initial),
                "o_proj": of_heads("DP"),
            }
        }

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        del context
        own = params["delta"]

        def heads(x_BTQ: jax.Array) -> jax.Array:
            return x_BTQ.reshape(*x_BTQ.shape[:2], self.num_heads, self.head_dim)

        qkv = (linear(x_BTD, own[name]) for name in ("q_proj", "k_proj", "v_proj"))
        qkv_BTX, tail = passage.convolved(jnp.concatenate(tuple(qkv), axis=-1), own["convolution"][:, 0])
        q_BTNH, k_BTNH, v_BTNH = (heads(part) for part in jnp.split(qkv_BTX, 3, axis=-1))
        gate_BTNH = heads(self._gate(own, "g", x_BTD))
        out_BTNH, state = passage.recurred(
            unit(q_BTNH, self.head_dim**-0.5),
            unit(k_BTNH),
            v_BTNH,
            self._log_decay(own, heads(self._gate(own, "f", x_BTD))),
            jax.nn.sigmoid(linear(x_BTD, own["b_proj"])),
        )
        normal_BTNH = apply_norm(self.norm, out_BTNH, own["norm"])
        gated_BTNH = (normal_BTNH * jax.nn.sigmoid(gate_BTNH.astype(jnp.float32))).astype(x_BTD.dtype)
        out_BTD = linear(gated_BTNH.reshape(*x_BTD.shape[:2], -1), own["o_proj"])
        return out_BTD, RecurrentCache(state, tail)

    def _gate(self, own: Tree, name: str, x_BTD: jax.Array) -> jax.Array:
        """(B, T, Q)."""
        if self.narrow_gates:
            return linear(linear(x_BTD, own[f"{name}_a_proj"]), own[f"{name}_b_proj"])
        return linear(x_BTD, own[f"{name}_proj"])

    def _log_decay(self, own: Tree, f_BTNH: jax.Array) -> jax.Array:
        """(B, T, N, H) float32."""
        bias_NH = own["step_bias"].astype(jnp.float32).reshape(self.num_heads, self.head_dim)
        step_BTNH = f_BTNH.astype(jnp.float32) + bias_NH[None, None]
        speed_BTNH = jnp.exp(own["decay"].astype(jnp.float32))[None, None, :, None]
        if self.least_log is None:
            return -speed_BTNH * jax.nn.softplus(step_BTNH)
        return self.least_log * jax.nn.sigmoid(speed_BTNH * step_BTNH)

    def describe(self) -> str:
        """Heads and their width."""
        return f"Kimi Delta Attention {self.num_heads} heads of {self.head_dim}"

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "Kimi Delta Attention"
        if self.least_log is not None:
            yield "bounded decay"
