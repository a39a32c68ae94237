"""Gated short convolution, as LFM2 has it in place of attention (Liquid AI, arXiv 2511.23404)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.recurrent import Passage, RecurrentCache, RecurrentMixer
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class ShortConvolutionSpec(RecurrentMixer):
    """out(c · convolution(b · v)), where b, c and v are projections of a token; the convolution has no activation.

    Attributes:
        channels: X.
        taps: c, tokens that the convolution spans.
    """

    channels: int
    taps: int

    @property
    def state_shape(self) -> None:
        """There is no state."""
        return None

    @property
    def tail_shape(self) -> tuple[int, int]:
        """(c − 1, X)."""
        return self.taps - 1, self.channels

    def params(self, width: int) -> Tree:
        """{"convolution": …}."""
        sizes = {"D": width, "X": self.channels, "J": 1, "c": self.taps}
        return {
            "convolution": {
                "in_proj": param("XD", sizes | {"X": 3 * self.channels}),
                "filters": param("XJc", sizes, role="convolution"),
                "out_proj": param("DX", sizes),
            }
        }

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        del context
        own = params["convolution"]
        b_BTX, c_BTX, v_BTX = jnp.split(linear(x_BTD, own["in_proj"]), 3, axis=-1)
        mixed_BTX, tail = passage.convolved(b_BTX * v_BTX, own["filters"][:, 0], silu=False)
        return linear(c_BTX * mixed_BTX, own["out_proj"]), RecurrentCache(None, tail)

    def describe(self) -> str:
        """Channels and taps."""
        return f"convolution of {self.channels} channels over {self.taps} tokens"

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "short convolution"
