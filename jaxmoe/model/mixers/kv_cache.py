"""The cache of attention: keys and values of the tokens before, and attention to them."""

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxmoe.model.mixers.query_blocks import by_query_blocks
from jaxmoe.model.mixers.selected_keys import unpacked_keys
from jaxmoe.parallel.sharding import constrain


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every position, of all repeats of a layer. What lies after a text's last token is void.

    Heads come before positions, so that no product with one token's queries transposes the keys of a whole text. 16-bit
    floats are kept as the integers of their bits: XLA on a CPU would widen the whole cache to write a token into it.

    Attributes:
        k: (L, B, M, S, H), rotated.
        v: (L, B, M, S, value width).
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: Any) -> "KVCache":
        """Of what has `dtype`."""
        k, v = (constrain(_kept(jnp.zeros(shape, dtype)), "..M..") for shape in (k_shape, v_shape))
        return cls(k, v)

    def written(
        self,
        repeat: jax.Array,
        positions_BT: Int[Array, "B T"],
        k_BTMH: Float[Array, "B T M H"],
        v_BTMV: Float[Array, "B T M values"],
    ) -> "KVCache":
        """With keys and values of one repeat at their positions; those past the end are left out."""
        rows = jnp.arange(positions_BT.shape[0])[:, None]

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            # Indices on both sides of a slice have their axes first: (B, T, M, width).
            cache = cache.at[repeat, rows, :, positions_BT].set(_kept(new), mode="drop")
            return constrain(cache, "..M..")

        return KVCache(put(self.k, k_BTMH), put(self.v, v_BTMV))

    def seen(
        self, repeat: jax.Array, positions_BT: Int[Array, "B T"], window: int | None, dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values (B, M, S, …) that queries at consecutive positions may see, and where they stand, (B, S).

        Args:
            repeat: () int32, which of the L.
            positions_BT: of the queries.
            window: keys that a query sees, itself included; None sees all before it.
            dtype: of what was written.
        """
        (_, batch, heads, length, _), queries = self.k.shape, positions_BT.shape[1]
        size = length if window is None else min(length, window + queries - 1)
        if window is None or size == length:
            starts_B = jnp.zeros((batch,), jnp.int32)
            k_BMSH, v_BMSV = self.k[repeat], self.v[repeat]
        else:
            starts_B = jnp.clip(positions_BT[:, 0] - window + 1, 0, length - size)

            def cut(cache: jax.Array) -> jax.Array:
                def of_row(cache_LMSH: jax.Array, start: jax.Array) -> jax.Array:
                    shape = (1, heads, size, cache.shape[-1])
                    return jax.lax.dynamic_slice(cache_LMSH, (repeat, 0, start, 0), shape)[0]

                return jax.vmap(of_row, in_axes=(1, 0))(cache, starts_B)

            k_BMSH, v_BMSV = cut(self.k), cut(self.v)
        if k_BMSH.dtype != dtype:
            k_BMSH, v_BMSV = (jax.lax.bitcast_convert_type(x, dtype) for x in (k_BMSH, v_BMSV))
        return k_BMSH, v_BMSV, starts_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None]


def _kept(x: jax.Array) -> jax.Array:
    """x as a cache has it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def attend_to_cache(
    q_BTNH: Float[Array, "B T N H"],
    k_BMSH: Float[Array, "B M S H"],
    v_BMSV: Float[Array, "B M S values"],
    queries_BT: Int[Array, "B T"],
    keys_BS: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    selected_BTs: UInt8[Array, "B T bytes"] | None = None,
) -> Float[Array, "B T N values"]:
    """`jaxmoe.model.mixers.attend.attend` for queries that are not those of the keys, by their positions.

    Args:
        q_BTNH: queries.
        k_BMSH, v_BMSV: keys and values; M divides N.
        queries_BT, keys_BS: positions; a key that is void has one after every query that counts.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
        sinks: (N,), one more logit per head, that attends to nothing.
        selected_BTs: of S keys those that a query may see, see `jaxmoe.model.mixers.selected_keys`; None for all.

    Returns:
        (B, T, N, value width) in q's dtype.
    """
    heads = k_BMSH.shape[1]
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, heads, 1, -1, 1)

    def attend(q_BCNH: jax.Array, queries_BC: jax.Array, selected_BCs: jax.Array | None) -> jax.Array:
        count = q_BCNH.shape[1]
        q_BMQH = einops.rearrange(q_BCNH, "b c (m r) h -> b m (r c) h", m=heads)
        products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores_BMSQ = scale * products("bmsh,bmqh->bmsq", k_BMSH, q_BMQH)
        scores_BMSRC = scores_BMSQ.reshape(*scores_BMSQ.shape[:3], -1, count)
        age_BSC = queries_BC[:, None] - keys_BS[:, :, None]
        seen_BSC = age_BSC >= 0 if window is None else (age_BSC >= 0) & (age_BSC < window)
        if selected_BCs is not None:
            seen_BSC &= unpacked_keys(selected_BCs)[..., : k_BMSH.shape[2]].mT
        scores_BMSRC = jnp.where(seen_BSC[:, None, :, None], scores_BMSRC, jnp.finfo(jnp.float32).min)
        top_BMRC = scores_BMSRC.max(axis=2, keepdims=True)
        if sinks is not None:
            top_BMRC = jnp.maximum(top_BMRC, sinks)
        shares_BMSRC = jnp.exp(scores_BMSRC - top_BMRC)
        total_BMRC = shares_BMSRC.sum(axis=2, keepdims=True)
        if sinks is not None:
            total_BMRC += jnp.exp(sinks - top_BMRC)
        shares_BMSQ = shares_BMSRC.reshape(scores_BMSQ.shape).astype(v_BMSV.dtype)
        out_BMVQ = products("bmsv,bmsq->bmvq", v_BMSV, shares_BMSQ)
        out_BMVRC = out_BMVQ.reshape(*out_BMVQ.shape[:3], -1, count) / total_BMRC
        return einops.rearrange(out_BMVRC, "b m v r c -> b c (m r) v").astype(q_BCNH.dtype)

    return by_query_blocks(attend, q_BTNH, queries_BT, selected_BTs)
