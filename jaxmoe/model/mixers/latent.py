"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), of all keys or of those selected."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.model.blocks import Mixer, Slot
from jaxmoe.model.linear import dense, linear
from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.heads import project_heads
from jaxmoe.model.mixers.indexer import IndexerSpec, IndexVectors, Places, divergences, select_keys
from jaxmoe.model.mixers.kv_cache import attend_to_cache
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope
from jaxmoe.model.mixers.selected_keys import KEYS, Selection
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.parallel.sharding import constrain
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """Queries are multiplied by 1 + beta · ln(1 + floor(position / length)), as in Llama 4."""

    beta: float
    length: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kept", "index_keys"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What is kept of every token, of all repeats of a layer. What lies after a text's last token is void.

    Attributes:
        kept: (L, B, S, latent + shared key), the narrow vector and the rotated key that heads share.
        index_keys: (L, B, S, H), the indexer's keys, rotated; None without one.
    """

    kept: jax.Array
    index_keys: Any = None

    def written(
        self, name: str, repeat: jax.Array, positions_BT: jax.Array, x_BTH: jax.Array
    ) -> "LatentCache":
        """With x at its positions in one repeat of the array `name`; what is past the end is left out."""
        array, rows = getattr(self, name), jnp.arange(positions_BT.shape[0])[:, None]
        array = array.at[repeat, rows, positions_BT].set(x_BTH.astype(array.dtype), mode="drop")
        return dataclasses.replace(self, **{name: constrain(array, "....")})


@dataclasses.dataclass(frozen=True)
class LatentAttentionSpec(Mixer):
    """Causal attention with keys and values that are made of one narrow vector per token.

    c = norm(kv_a x)[: latent] is that vector. A head's key is its own part of kv_b c, and beside it the rest of kv_a x,
    which all heads share and which is rotated; its value is its own part of kv_b c. Queries are q_proj x, or
    q_b norm(q_a x) with a narrow vector of their own, and as wide as keys.

    Attributes:
        num_heads: N, of queries, keys and values alike.
        key_dim: width of the part of a key that is a head's own.
        shared_dim: width of the part that heads share.
        value_dim: width of a value, at most that of a whole key.
        latent: width of c.
        query_latent: width of the vector that queries are made of; None makes them of x.
        rope: rotation of what keys share; None leaves order to the mask and to other layers.
        norm: of the narrow vectors.
        bias: biases on q_a, kv_a and the output projection.
        scale: factor of the scores; by default 1/sqrt of the width of a whole key.
        growth: of queries with their positions.
        head_gated: what a head gives is multiplied by sigmoid(gate x), a number per head (arXiv 2505.06708).
        query_gated: the output is multiplied by a sigmoid before the output projection (arXiv 2505.06708), whose rows
            are among those of q_b: a head's follow those of its query. q_b sees norm(q_a x) and, beside it, q_a x.
        top_k: keys that a query sees at most; None for all. They are those that the indexer selects, or without one
            those that the last layer with an indexer has selected.
        indexer: of a layer with `top_k`; needs a `query_latent`.
    """

    num_heads: int
    key_dim: int
    shared_dim: int
    value_dim: int
    latent: int
    query_latent: int | None
    rope: RopeSpec | None
    norm: NormSpec
    bias: bool = False
    scale: float | None = None
    growth: QueryGrowth | None = None
    head_gated: bool = False
    query_gated: bool = False
    top_k: int | None = None
    indexer: IndexerSpec | None = None

    @property
    def whole_key(self) -> int:
        """H, the width of a key with its shared part."""
        return self.key_dim + self.shared_dim

    def params(self, width: int) -> Tree:
        """{"attention": …, "indexer": …}."""
        heads, latent = self.num_heads, self.latent
        sizes = {
            "D": width,
            "N": heads,
            "A": self.query_latent or 0,
            "C": latent,
            "Q": heads * self.whole_key,
            "U": heads * (self.key_dim + self.value_dim),
            "P": heads * self.value_dim,
        }
        # The key that heads share comes out of the same matrix.
        beside = sizes | {"C": latent + self.shared_dim}
        gated = sizes | {"A": 2 * sizes["A"], "Q": heads * (self.whole_key + self.value_dim)}
        of_heads = functools.partial(param, sizes=sizes, num_heads=heads)
        vector = functools.partial(param, role="vector", init="ones")
        if self.query_latent is None:
            params = {"q_proj": of_heads("QD")}
        else:
            params = {
                "q_a_proj": param("AD", sizes),
                "q_a_norm": vector("A", sizes),
                "q_b_proj": param("QA", gated if self.query_gated else sizes, num_heads=heads),
            }
        params |= {
            "kv_a_proj": param("CD", beside),
            "kv_a_norm": vector("C", sizes),
            "kv_b_proj": of_heads("UC"),
            "o_proj": of_heads("DP"),
        }
        if self.head_gated:
            params["gate_proj"] = param("ND", sizes)
        if self.bias:
            biases = {"kv_a_bias": ("C", beside), "o_bias": ("D", sizes)}
            if self.query_latent is not None:
                biases["q_a_bias"] = ("A", sizes)
            params |= {
                name: param(letter, own, role="vector", init="zeros")
                for name, (letter, own) in biases.items()
            }
        if self.indexer is None:
            return {"attention": params}
        return {"attention": params, "indexer": self.indexer.params(width, sizes["A"])}

    def select(
        self, params: Tree, x_BTD: jax.Array, context: Context, slot: Slot | None
    ) -> tuple[Selection, Tree]:
        """What the indexer selects, if there is one and more keys than that; and the cache with the indexer's keys.

        The indexer sees activations without their gradient: what trains it trains nothing else.
        """
        if self.indexer is None or self.top_k is None:
            return super().select(params, x_BTD, context, slot)
        own, params, x_BTD = params["indexer"], *jax.lax.stop_gradient((params["attention"], x_BTD))
        tables = context.rotations[self.indexer.rope]
        k_BSH = self.indexer.keys(own, x_BTD, tables)
        places_BT, cache = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None], None
        if slot is not None:
            cache = slot[0].written("index_keys", slot[1], context.positions, k_BSH)
            if not context.fresh:
                k_BSH, places_BT = cache.index_keys[slot[1]].astype(x_BTD.dtype), context.positions
        stats, chosen = context.selection.stats, k_BSH.shape[1] > self.top_k
        if not chosen and stats is None:
            return Selection(), cache
        _, narrow_BTA = self._narrow_queries(params, x_BTD)
        index = IndexVectors(*self.indexer.queries(own, x_BTD, narrow_BTA, tables), k_BSH)
        places = Places(jnp.broadcast_to(places_BT, x_BTD.shape[:2]), context.documents)
        keys = constrain(select_keys(index, places, self.top_k), "BT.") if chosen else None
        if stats is not None:
            k_BTNH, _ = self._keys_and_values(params, self._kept(params, x_BTD, context))
            q_BTNH, _ = self._queries(params, x_BTD, context)
            divergences_BT = divergences(index, places, keys, q_BTNH, k_BTNH, self._score_scale)
            stats = stats.add(divergences_BT, context.valid)
        return Selection(keys, stats), cache

    def unselected(self, x_BTD: jax.Array, context: Context, slot: Slot | None) -> jax.Array | None:
        """(B, T, bytes) of zeros, if the indexer will select."""
        keys = x_BTD.shape[1] if slot is None or context.fresh else slot[0].kept.shape[2]
        if self.indexer is None or self.top_k is None or keys <= self.top_k:
            return None
        return constrain(jnp.zeros((*x_BTD.shape[:2], -(-keys // KEYS)), jnp.uint8), "BT.")

    def _selected(self, context: Context) -> jax.Array | None:
        return None if self.top_k is None else context.selection.keys

    def apply(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """x (B, T, D) → (B, T, D)."""
        params = params["attention"]
        (q_BTNH, gate_BTNV), kept_BTC = (
            self._queries(params, x_BTD, context),
            self._kept(params, x_BTD, context),
        )
        return self._output(params, self._attend(params, q_BTNH, kept_BTC, context), x_BTD, gate_BTNV)

    def init_cache(self, repeats: int, batch: int, length: int, dtype: Any) -> LatentCache:
        """Of zeros."""

        def zeros(width: int) -> jax.Array:
            return constrain(jnp.zeros((repeats, batch, length, width), dtype), "....")

        index_keys = None if self.indexer is None else zeros(self.indexer.head_dim)
        return LatentCache(zeros(self.latent + self.shared_dim), index_keys)

    def decode(
        self, params: Tree, x_BTD: jax.Array, context: Context, cache: LatentCache, repeat: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """x (B, T, D) → (B, T, D), with attention to what is cached, and the cache with the tokens of x.

        A head's queries go through its part of kv_b instead of all keys, and so do its values after they were summed
        up: then all heads attend to the cache as it is, as if it were one head of keys.
        """
        params = params["attention"]
        (q_BTNH, gate_BTNV), kept_BTC = (
            self._queries(params, x_BTD, context),
            self._kept(params, x_BTD, context),
        )
        positions_BT = context.positions
        cache = cache.written("kept", repeat, positions_BT, kept_BTC)
        if context.fresh:
            out_BTNV = self._attend(params, q_BTNH, kept_BTC, context)
            return self._output(params, out_BTNV, x_BTD, gate_BTNV), cache
        up_NHC = dense(params["kv_b_proj"], x_BTD.dtype).reshape(self.num_heads, -1, self.latent)
        q_BTNC = jnp.einsum("btnh,nhc->btnc", q_BTNH[..., : self.key_dim], up_NHC[:, : self.key_dim])
        q_BTNC = jnp.concatenate([q_BTNC, q_BTNH[..., self.key_dim :]], axis=-1)
        seen_BMSC = cache.kept[repeat][:, None].astype(x_BTD.dtype)
        places = jnp.arange(seen_BMSC.shape[2], dtype=jnp.int32)[None]
        out_BTNC = attend_to_cache(
            q_BTNC,
            seen_BMSC,
            seen_BMSC[..., : self.latent],
            positions_BT,
            jnp.broadcast_to(places, seen_BMSC[:, 0, :, 0].shape),
            scale=self._score_scale,
            selected_BTs=self._selected(context),
        )
        out_BTNV = jnp.einsum("btnc,nvc->btnv", out_BTNC, up_NHC[:, self.key_dim :])
        return self._output(params, out_BTNV, x_BTD, gate_BTNV), cache

    @property
    def _score_scale(self) -> float:
        return self.whole_key**-0.5 if self.scale is None else self.scale

    def _queries(
        self, params: Tree, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array | None]:
        """(B, T, N, H), ready to attend, and the logits of their gate (B, T, N, value width)."""
        if self.query_latent is None:
            q_BTQ = linear(x_BTD, params["q_proj"])
        else:
            raw_BTA, seen_BTA = self._narrow_queries(params, x_BTD)
            if self.query_gated:
                seen_BTA = jnp.concatenate([seen_BTA, raw_BTA], axis=-1)
            q_BTQ = linear(seen_BTA, params["q_b_proj"])
        q_BTNH, gate_BTNV = q_BTQ.reshape(*q_BTQ.shape[:2], self.num_heads, -1), None
        if self.query_gated:
            q_BTNH, gate_BTNV = jnp.split(q_BTNH, [self.whole_key], axis=-1)
            gate_BTNV = constrain(gate_BTNV, "BTN.")
        rotated = self._rotated(q_BTNH[..., self.key_dim :], context)
        q_BTNH = jnp.concatenate([q_BTNH[..., : self.key_dim], rotated], axis=-1)
        if self.growth is not None:
            times = jnp.floor(context.positions.astype(jnp.float32) / self.growth.length)
            growth_BT = 1 + self.growth.beta * jnp.log1p(times)
            q_BTNH = q_BTNH * growth_BT[:, :, None, None].astype(q_BTNH.dtype)
        return constrain(q_BTNH, "BTNH"), gate_BTNV

    def _narrow_queries(self, params: Tree, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, T, A) twice, as it is and normed."""
        narrow_BTA = linear(x_BTD, params["q_a_proj"], params.get("q_a_bias"))
        return narrow_BTA, apply_norm(self.norm, narrow_BTA, params["q_a_norm"])

    def _kept(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """(B, T, latent + shared key), normed and rotated: what keys and values are made of."""
        both = linear(x_BTD, params["kv_a_proj"], params.get("kv_a_bias"))
        narrow_BTC = apply_norm(self.norm, both[..., : self.latent], params["kv_a_norm"])
        shared_BTMH = self._rotated(both[..., None, self.latent :], context)
        return jnp.concatenate([narrow_BTC, shared_BTMH[:, :, 0]], axis=-1)

    def _rotated(self, x_BTNH: jax.Array, context: Context) -> jax.Array:
        """The shared part of keys, and what queries have for it."""
        return x_BTNH if self.rope is None else apply_rope(self.rope, x_BTNH, context.rotations[self.rope])

    def _attend(self, params: Tree, q_BTNH: jax.Array, kept_BTC: jax.Array, context: Context) -> jax.Array:
        """Attention of tokens to one another, (B, T, N, value width)."""
        return attend(
            q_BTNH,
            *self._keys_and_values(params, kept_BTC),
            context.documents,
            scale=self._score_scale,
            selected_BTs=self._selected(context),
            device=context.device,
        )

    def _keys_and_values(self, params: Tree, kept_BTC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, T, N, H) and (B, T, N, value width)."""
        kv_BTU = linear(kept_BTC[..., : self.latent], params["kv_b_proj"])
        kv_BTNU = constrain(kv_BTU.reshape(*kv_BTU.shape[:2], self.num_heads, -1), "BTN.")
        shared = kept_BTC[:, :, None, self.latent :]
        shared_BTNH = jnp.broadcast_to(shared, (*kv_BTNU.shape[:3], self.shared_dim))
        k_BTNH = constrain(jnp.concatenate([kv_BTNU[..., : self.key_dim], shared_BTNH], axis=-1), "BTNH")
        return k_BTNH, kv_BTNU[..., self.key_dim :]

    def _output(
        self, params: Tree, out_BTNV: jax.Array, x_BTD: jax.Array, gate_BTNV: jax.Array | None
    ) -> jax.Array:
        """What heads give (B, T, N, value width), gated by x or by what came with queries → (B, T, D)."""
        if gate_BTNV is not None:
            open_BTNV = jax.nn.sigmoid(gate_BTNV.astype(jnp.float32))
            out_BTNV = (out_BTNV * open_BTNV).astype(out_BTNV.dtype)
        if self.head_gated:
            gate_BTN = jax.nn.sigmoid(linear(x_BTD, params["gate_proj"]).astype(jnp.float32))
            out_BTNV = out_BTNV * gate_BTN[..., None].astype(out_BTNV.dtype)
        return project_heads(out_BTNV, params["o_proj"], params.get("o_bias"))

    def rotations(self) -> frozenset[RopeSpec]:
        """Of queries and the key that heads share, and of the indexer's."""
        own = set() if self.rope is None else {self.rope}
        return frozenset(own if self.indexer is None else own | {self.indexer.rope})

    def mixing_flops(self, length: int) -> float:
        """2 N (H + H_v) per key that is seen, as every head has keys and values of its own, and what scoring takes.

        A query sees half of a document on average, or of one longer than top_k all until that, and as many ever after.
        """
        most = length if self.top_k is None else min(self.top_k, length)
        seen = most - most**2 / (2 * length)
        scoring = 0.0 if self.indexer is None else self.indexer.scoring_flops(length)
        return 2 * self.num_heads * (self.whole_key + self.value_dim) * seen + scoring

    def problems(self) -> Iterator[str]:
        """Values that are too wide, an indexer without narrow queries or narrower than what is rotated."""
        if self.value_dim > self.whole_key:
            yield (
                f"v_head_dim {self.value_dim} is more than qk_nope_head_dim {self.key_dim} and qk_rope_head_dim "
                f"{self.shared_dim} together: values wider than keys are not supported"
            )
        if self.indexer is not None:
            if self.query_latent is None:
                yield "q_lora_rank is null: expected a width, as the indexer's queries are made of that vector"
            yield from self.indexer.problems()

    def describe(self) -> str:
        """Heads and latent widths."""
        queries = "" if self.query_latent is None else f", of queries {self.query_latent}"
        keys = "" if self.top_k is None else f", top {self.top_k} keys"
        keys += "" if self.indexer is None else f" by {self.indexer.describe()}"
        return (
            f"latent attention {self.num_heads} heads of {self.key_dim}+{self.shared_dim}, "
            f"latent {self.latent}{queries}{keys}"
        )

    def traits(self) -> Iterator[str]:
        """In the order of the table of models in the README."""
        yield "latent keys and values"
        told = {
            "latent queries": self.query_latent is not None,
            "biases": self.bias,
            "narrower values": self.value_dim != self.whole_key,
            "own score scale": self.scale is not None,
            "queries that grow": self.growth is not None,
            "gated heads": self.head_gated,
            "gate": self.query_gated,
            "sparse by an indexer": self.indexer is not None,
            "selection of a layer before": self.top_k is not None and self.indexer is None,
        }
        yield from (text for text, holds in told.items() if holds)
        if self.rope is None:
            yield "no rope"
        else:
            yield from self.rope.traits(self.shared_dim)
