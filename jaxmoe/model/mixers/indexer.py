"""The indexer of DeepSeek sparse attention: which keys a query attends to (DeepSeek-V3.2, arXiv 2512.02556,
section 2.1)."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float, UInt8

from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.query_blocks import by_query_blocks
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope
from jaxmoe.model.mixers.selected_keys import highest, packed_keys, unpacked_keys, visible_keys
from jaxmoe.model.norms import NormSpec, norm
from jaxmoe.parallel.sharding import by_rows
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
        sizes = {"D": width, "A": query_latent, "J": self.num_heads, "H": self.head_dim}
        return {
            "q_proj": param("HA", sizes | {"H": self.num_heads * self.head_dim}, chooses=True),
            "k_proj": param("HD", sizes, chooses=True),
            "k_norm": param("H", sizes, role="vector", init="ones", chooses=True),
            "k_norm_bias": param("H", sizes, role="vector", init="zeros", chooses=True),
            "head_weights": param("JD", sizes, chooses=True),
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


class IndexVectors(NamedTuple):
    """What scores are made of.

    Attributes:
        q_BTNH, weights_BTN: as from `IndexerSpec.queries`.
        k_BSH: as from `IndexerSpec.keys`, of places 0 … S − 1.
    """

    q_BTNH: jax.Array
    weights_BTN: jax.Array
    k_BSH: jax.Array


class Places(NamedTuple):
    """Where queries stand, which see the keys of their document that are not later.

    Attributes:
        of_queries_BT: int32.
        documents_BT: the same number within one document, of queries and keys that are those of the same tokens; None
            where causality alone keeps documents apart.
    """

    of_queries_BT: jax.Array
    documents_BT: jax.Array | None = None


def select_keys(index: IndexVectors, places: Places, count: int) -> UInt8[Array, "B T bytes"]:
    """The `count` keys with the highest scores of those that a query sees, of equal scores the first keys.

    Where a query sees no more than that, all of them. The scores of all heads are there for a few queries at once,
    never for all.

    Args:
        index: with more keys than `count`.
        places: of the queries.
        count: keys that are chosen.

    Returns:
        As `jaxmoe.model.mixers.selected_keys` writes them.
    """

    def select(index: IndexVectors, places: Places) -> jax.Array:
        def choose(
            q_BCNH: jax.Array,
            weights_BCN: jax.Array,
            of_queries_BC: jax.Array,
            documents_BC: jax.Array | None,
        ) -> jax.Array:
            visible_BCS = visible_keys(of_queries_BC, index.k_BSH.shape[1], documents_BC, places.documents_BT)
            scores_BCS = index_scores(q_BCNH, weights_BCN, index.k_BSH)
            return packed_keys(highest(scores_BCS, visible_BCS, count))

        return by_query_blocks(choose, index.q_BTNH, index.weights_BTN, *places)

    # Choices have no gradient, but jax would carry one as far as the scores.
    return by_rows(select, jax.lax.stop_gradient(index), places)


def divergences(
    index: IndexVectors,
    places: Places,
    keys_BTs: UInt8[Array, "B T bytes"] | None,
    q_BTNH: Float[Array, "B T heads width"],
    k_BTNH: Float[Array, "B T heads width"],
    scale: float,
) -> Float[Array, "B T"]:
    """KL(p_t ‖ softmax(scores of t)) in nats, over the keys that a query t attends to (section 2.1.1, eq. 4).

    p_t is the mean over attention's heads of the weights that they give the keys. Its gradient makes the indexer's
    scores follow them.

    Args:
        index: of the same tokens.
        places: of the queries.
        keys_BTs: as from `select_keys`; None where a query attends to all keys that it sees.
        q_BTNH, k_BTNH: of attention.
        scale: factor of its scores.
    """
    # Gradients of keys are summed over blocks in float32.
    wide_BSH = index.k_BSH.astype(jnp.float32)

    @jax.checkpoint
    def of_block(
        q_BCNI: jax.Array,
        weights_BCN: jax.Array,
        of_queries_BC: jax.Array,
        documents_BC: jax.Array | None,
        keys_BCs: jax.Array | None,
        q_BCNH: jax.Array,
    ) -> jax.Array:
        length = wide_BSH.shape[1]
        seen_BCS = visible_keys(of_queries_BC, length, documents_BC, places.documents_BT)
        if keys_BCs is not None:
            seen_BCS &= unpacked_keys(keys_BCs)[..., :length]
        lowest = jnp.finfo(jnp.float32).min
        scores_BNCS = jnp.einsum("bcnh,bsnh->bncs", q_BCNH, k_BTNH, preferred_element_type=jnp.float32)
        shares_BNCS = jax.nn.softmax(jnp.where(seen_BCS[:, None], scale * scores_BNCS, lowest), axis=-1)
        p_BCS = jnp.mean(shares_BNCS, axis=1)
        own_BCS = index_scores(q_BCNI, weights_BCN, wide_BSH.astype(index.k_BSH.dtype))
        log_BCS = jax.nn.log_softmax(jnp.where(seen_BCS, own_BCS, lowest), axis=-1)
        return jnp.sum(xlogy(p_BCS, p_BCS) - p_BCS * jnp.where(seen_BCS, log_BCS, 0), axis=-1)

    return by_query_blocks(of_block, index.q_BTNH, index.weights_BTN, *places, keys_BTs, q_BTNH)


def index_scores(
    q_BTNH: Float[Array, "B T N H"], weights_BTN: Float[Array, "B T N"], k_BSH: Float[Array, "B S H"]
) -> Float[Array, "B T S"]:
    """Σ_n w_tn · relu(q_tn · k_s) in float32."""
    products_BNTS = jnp.einsum("btnh,bsh->bnts", q_BTNH, k_BSH, preferred_element_type=jnp.float32)
    return jnp.einsum("btn,bnts->bts", weights_BTN, jax.nn.relu(products_BNTS))
