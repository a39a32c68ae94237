"""The indexer of DeepSeek sparse attention: which keys a query attends to (DeepSeek-V3.2, arXiv 2512.02556,
section 2.1)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.query_blocks import by_query_blocks
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope
from jaxmoe.model.mixers.selected_keys import highest, packed_keys, visible_keys
from jaxmoe.model.norms import NormSpec, norm
from jaxmoe.params import Param, Tree, param

# Whatever rms_norm_eps says.
_NORM = NormSpec(1e-6, "layer", bias=True)

Tables = tuple[jax.Array, jax.Array]
"""Of a rotation."""


@dataclasses.dataclass(frozen=True)
class IndexerSpec:
    """Scores Σ_n w_tn · relu(q_tn · k_s) of a query t and a key s, by which queries choose their keys.

    q_tn is one of N queries of t, made of the narrow vector that attention makes its own of; k_s = norm(k_proj x_s) is
    the only key of s; w_tn is a part of head_weights x_t. Queries and keys are rotated.

    Attributes:
        num_heads: N.
        head_dim: H, the width of queries and keys.
        rope: rotation of their first features.
    """

    num_heads: int
    head_dim: int
    rope: RopeSpec

    def params(self, width: int, query_latent: int) -> dict[str, Param]:
        """Declarations. Every device of a mesh's tensor axis has all heads, so that it sums up their scores alike."""
        sizes = {"D": width, "A": query_latent, "N": self.num_heads, "H": self.head_dim}
        return {
            "q_proj": param("HA", sizes | {"H": self.num_heads * self.head_dim}, chooses=True),
            "k_proj": param("HD", sizes, chooses=True),
            "k_norm": param("H", sizes, role="vector", init="ones", chooses=True),
            "k_norm_bias": param("H", sizes, role="vector", init="zeros", chooses=True),
            "head_weights": param("ND", sizes, chooses=True),
        }

    def keys(self, params: Tree, x_BTD: Float[Array, "B T D"], tables: Tables) -> Float[Array, "B T H"]:
        """The key of every token."""
        k_BTH = norm(params, "k_norm", _NORM, linear(x_BTD, params["k_proj"]))
        return apply_rope(self.rope, k_BTH[:, :, None], tables)[:, :, 0]

    def queries(
        self, params: Tree, x_BTD: Float[Array, "B T D"], narrow_BTA: Float[Array, "B T A"], tables: Tables
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """q of every token and its w, which is in float32 and has the factors 1/sqrt(N) and 1/sqrt(H) in it."""
        q_BTH = linear(narrow_BTA, params["q_proj"])
        q_BTNH = q_BTH.reshape(*q_BTH.shape[:2], self.num_heads, self.head_dim)
        weights_BTN = linear(x_BTD, params["head_weights"]).astype(jnp.float32)
        weights_BTN = weights_BTN * (self.num_heads * self.head_dim) ** -0.5
        return apply_rope(self.rope, q_BTNH, tables), weights_BTN

    def scoring_flops(self, length: int) -> float:
        """N H T, as a query scores half of a document on average."""
        return self.num_heads * self.head_dim * float(length)

    def problems(self) -> Iterator[str]:
        """A rotation that is wider than heads."""
        if self.rope.rotary_dim > self.head_dim:
            yield (
                f"index_head_dim {self.head_dim} is less than qk_rope_head_dim {self.rope.rotary_dim}: expected room "
                "for the features that are rotated"
            )

    def describe(self) -> str:
        """Its heads."""
        return f"{self.num_heads} heads of {self.head_dim}"


def select_keys(
    q_BTNH: Float[Array, "B T N H"],
    weights_BTN: Float[Array, "B T N"],
    k_BSH: Float[Array, "B S H"],
    places_BT: Int[Array, "B T"],
    documents_BT: Int[Array, "B T"] | None = None,
    *,
    count: int,
) -> UInt8[Array, "B T bytes"]:
    """The `count` keys with the highest scores of those of a query's document that are not later than it.

    Where there are fewer, these; of equal scores the first keys. The scores of all heads are there for a few queries
    at once, never for all.

    Args:
        q_BTNH, weights_BTN: as from `IndexerSpec.queries`.
        k_BSH: as from `IndexerSpec.keys`, of places 0 … S − 1; S > count.
        places_BT: of the queries.
        documents_BT: the same number within one document, of queries and keys that are those of the same tokens; None
            where causality alone keeps documents apart.
        count: keys that are chosen.

    Returns:
        As `jaxmoe.model.mixers.selected_keys` writes them.
    """

    def choose(
        q_BCNH: jax.Array, weights_BCN: jax.Array, places_BC: jax.Array, documents_BC: jax.Array | None
    ) -> jax.Array:
        visible_BCS = visible_keys(places_BC, k_BSH.shape[1], documents_BC, documents_BT)
        return packed_keys(highest(index_scores(q_BCNH, weights_BCN, k_BSH), visible_BCS, count))

    return by_query_blocks(choose, q_BTNH, weights_BTN, places_BT, documents_BT)


def index_scores(
    q_BTNH: Float[Array, "B T N H"], weights_BTN: Float[Array, "B T N"], k_BSH: Float[Array, "B S H"]
) -> Float[Array, "B T S"]:
    """Σ_n w_tn · relu(q_tn · k_s) in float32."""
    products_BNTS = jnp.einsum("btnh,bsh->bnts", q_BTNH, k_BSH, preferred_element_type=jnp.float32)
    return jnp.einsum("btn,bnts->bts", weights_BTN, jax.nn.relu(products_BNTS))
