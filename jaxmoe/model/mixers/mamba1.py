"""Mamba (Gu and Dao, arXiv 2312.00752), as Jamba has it (Lieber et al., arXiv 2403.19887)."""

import dataclasses
import functools
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
class Mamba1Spec(RecurrentMixer):
    """out(silu(z) · (y + skip · x)), with y of `selective_scan` over x.

    One projection gives x and z, and x goes through a convolution with SiLU. A projection of that gives, of all
    channels, keys, queries and a latent of the steps, each normed; the steps are softplus(dt(latent) + step_bias) and
    the rates exp(decay).

    Attributes:
        channels: X.
        state_size: Y, numbers of a channel's state.
        step_latent: A, width of the latent of the steps.
        taps: c, tokens that the convolution spans.
        norm: of that latent, of keys and of queries.
        convolution_bias: a bias on every channel of the convolution.
    """

    channels: int
    state_size: int
    step_latent: int
    taps: int
    norm: NormSpec
    convolution_bias: bool = True

    @property
    def state_shape(self) -> tuple[int, int]:
        """(X, Y)."""
        return self.channels, self.state_size

    @property
    def tail_shape(self) -> tuple[int, int]:
        """(c − 1, X)."""
        return self.taps - 1, self.channels

    def params(self, width: int) -> Tree:
        """{"mamba": …}."""
        sizes = {
            "D": width,
            "X": self.channels,
            "Y": self.state_size,
            "A": self.step_latent,
            "C": self.step_latent + 2 * self.state_size,
            "J": 1,
            "c": self.taps,
        }
        declared = {
            "in_proj": param("XD", sizes | {"X": 2 * self.channels}),
            "convolution": param("XJc", sizes, role="convolution"),
            "x_proj": param("CX", sizes),
            "step_norm": param("A", sizes, role="vector", init=self.norm.initial),
            "key_norm": param("Y", sizes, role="vector", init=self.norm.initial),
            "query_norm": param("Y", sizes, role="vector", init=self.norm.initial),
            "step_proj": param("XA", sizes),
            "step_bias": param("X", sizes, role="decay", init="ones"),
            "decay": param("XY", sizes, role="decay", init="zeros"),
            "skip": param("X", sizes, role="vector", init="ones"),
            "out_proj": param("DX", sizes),
        }
        if self.convolution_bias:
            declared["convolution_bias"] = param("X", sizes, role="vector", init="zeros")
        return {"mamba": declared}

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        del context
        own = params["mamba"]
        x_BTX, z_BTX = jnp.split(linear(x_BTD, own["in_proj"]), 2, axis=-1)
        x_BTX, tail = passage.convolved(x_BTX, own["convolution"][:, 0], own.get("convolution_bias"))
        ends = (self.step_latent, self.step_latent + self.state_size)
        latent_BTA, key_BTY, query_BTY = (
            apply_norm(self.norm, part, own[name])
            for part, name in zip(
                jnp.split(linear(x_BTX, own["x_proj"]), ends, axis=-1),
                ("step_norm", "key_norm", "query_norm"),
                strict=True,
            )
        )
        step_BTX = jax.nn.softplus(
            linear(latent_BTA, own["step_proj"]).astype(jnp.float32)
            + own["step_bias"].astype(jnp.float32)[None, None]
        )
        rate_XY = jnp.exp(own["decay"].astype(jnp.float32))
        read_BTX, state = passage.scanned(x_BTX, step_BTX, key_BTY, query_BTY, rate_XY)
        out_BTX = _gated(read_BTX, x_BTX, z_BTX, own["skip"])
        return linear(out_BTX, own["out_proj"]), RecurrentCache(state, tail)

    def describe(self) -> str:
        """Channels and their state's size."""
        return f"Mamba {self.channels} channels, state {self.state_size}"

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "Mamba"


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(
    read_BTX: Float[Array, "B T X"],
    x_BTX: Float[Array, "B T X"],
    z_BTX: Float[Array, "B T X"],
    skip_X: Float[Array, "X"],
) -> Float[Array, "B T X"]:
    """silu(z) · (read + skip · x) in float32, in z's dtype. The backward pass keeps the operands alone."""
    skipped_BTX = skip_X.astype(jnp.float32)[None, None] * x_BTX.astype(jnp.float32)
    return ((read_BTX + skipped_BTX) * jax.nn.silu(z_BTX.astype(jnp.float32))).astype(z_BTX.dtype)
