"""Lightning attention (Qin et al., arXiv 2401.04658), as MiniMax-01 (arXiv 2501.08313, section 2.2) has it."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.recurrent import Passage, RecurrentCache, RecurrentMixer
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class LightningSpec(RecurrentMixer):
    """out(sigmoid(gate x) · norm(o)), with o read by queries from a state that decays and keys write values to.

    Queries, keys and values are silu(qkv x), with a head's query, key and value in neighbouring rows. Nothing scales
    what is read but the norm, over all heads together.

    Attributes:
        num_heads: N.
        head_dim: H, also of values.
        norm: of the output.
        depth: layers of the model, of any kind: how fast a state decays goes by a layer's number among them.
    """

    num_heads: int
    head_dim: int
    norm: NormSpec
    depth: int

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(N, H, H)."""
        return self.num_heads, self.head_dim, self.head_dim

    @property
    def tail_shape(self) -> None:
        """There is no convolution."""
        return None

    def params(self, width: int) -> Tree:
        """{"lightning": …}."""
        attended = self.num_heads * self.head_dim
        sizes = {"D": width, "Q": 3 * attended, "P": attended}
        return {
            "lightning": {
                "qkv_proj": param("QD", sizes, num_heads=self.num_heads),
                "gate_proj": param("PD", sizes, num_heads=self.num_heads),
                "norm": param("P", sizes, role="vector", init=self.norm.initial),
                "out_proj": param("DP", sizes, num_heads=self.num_heads),
            }
        }

    def mix(
        self, params: Tree, x_BTD: jax.Array, context: Context, passage: Passage
    ) -> tuple[jax.Array, RecurrentCache]:
        """x (B, T, D) → (B, T, D), and what comes after."""
        own, tokens = params["lightning"], x_BTD.shape[:2]
        qkv_BTNX = jax.nn.silu(linear(x_BTD, own["qkv_proj"])).reshape(*tokens, self.num_heads, -1)
        q_BTNH, k_BTNH, v_BTNH = jnp.split(qkv_BTNX, 3, axis=-1)
        log_decay_N = jnp.asarray(self.log_decays, jnp.float32)[context.layer]
        log_decay_BTN = jnp.broadcast_to(log_decay_N[None, None], qkv_BTNX.shape[:3])
        out_BTNH, state = passage.recurred(q_BTNH, k_BTNH, v_BTNH, log_decay_BTN)
        normal_BTP = apply_norm(self.norm, out_BTNH.astype(x_BTD.dtype).reshape(*tokens, -1), own["norm"])
        gated_BTP = jax.nn.sigmoid(linear(x_BTD, own["gate_proj"])) * normal_BTP
        return linear(gated_BTP, own["out_proj"]), RecurrentCache(state, None)

    @property
    def log_decays(self) -> np.ndarray:
        """(layers, N) float64: ln of what a token leaves of a state.

        The slopes of ALiBi (arXiv 2108.12409) for the heads, and ever less of them from layer to layer: the last one's
        differ from 0 by so little that float32 would not do for the subtraction.
        """
        slopes_N = 2.0 ** (-8 / self.num_heads * np.arange(1, self.num_heads + 1))
        shares_L = 1 - np.arange(self.depth) / (self.depth - 1 + 1e-5) + 1e-5
        return -shares_L[:, None] * slopes_N[None]

    def describe(self) -> str:
        """Heads and their width."""
        return f"lightning attention {self.num_heads} heads of {self.head_dim}"

    def traits(self) -> Iterator[str]:
        """What it is."""
        yield "lightning attention"
