"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.model.blocks import Mixer
from jaxmoe.model.linear import dense, linear
from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.heads import project_heads
from jaxmoe.model.mixers.kv_cache import attend_to_cache
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.parallel.sharding import constrain
from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """Queries are multiplied by 1 + beta · ln(1 + floor(position / length)), as in Llama 4."""

    beta: float
    length: int


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

    @property
    def whole_key(self) -> int:
        """H, the width of a key with its shared part."""
        return self.key_dim + self.shared_dim

    def params(self, width: int) -> Tree:
        """{"attention": …}."""
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
        of_heads = functools.partial(param, sizes=sizes, num_heads=heads)
        vector = functools.partial(param, role="vector", init="ones")
        if self.query_latent is None:
            params = {"q_proj": of_heads("QD")}
        else:
            params = {
                "q_a_proj": param("AD", sizes),
                "q_a_norm": vector("A", sizes),
                "q_b_proj": of_heads("QA"),
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
        return {"attention": params}

    def apply(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """x (B, T, D) → (B, T, D)."""
        params = params["attention"]
        q_BTNH, kept_BTC = self._queries(params, x_BTD, context), self._kept(params, x_BTD, context)
        return self._output(params, self._attend(params, q_BTNH, kept_BTC, context), x_BTD)

    def init_cache(self, repeats: int, batch: int, length: int, dtype: Any) -> jax.Array:
        """(L, B, S, latent + shared key): of every token the narrow vector and the key that heads share."""
        width = self.latent + self.shared_dim
        return constrain(jnp.zeros((repeats, batch, length, width), dtype), "....")

    def decode(
        self, params: Tree, x_BTD: jax.Array, context: Context, cache: jax.Array, repeat: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x (B, T, D) → (B, T, D), with attention to what is cached, and the cache with the tokens of x.

        A head's queries go through its part of kv_b instead of all keys, and so do its values after they were summed
        up: then all heads attend to the cache as it is, as if it were one head of keys.
        """
        params = params["attention"]
        q_BTNH, kept_BTC = self._queries(params, x_BTD, context), self._kept(params, x_BTD, context)
        positions_BT = context.positions
        rows = jnp.arange(positions_BT.shape[0])[:, None]
        cache = cache.at[repeat, rows, positions_BT].set(kept_BTC.astype(cache.dtype), mode="drop")
        cache = constrain(cache, "....")
        if context.fresh:
            return self._output(params, self._attend(params, q_BTNH, kept_BTC, context), x_BTD), cache
        up_NHC = dense(params["kv_b_proj"], x_BTD.dtype).reshape(self.num_heads, -1, self.latent)
        q_BTNC = jnp.einsum("btnh,nhc->btnc", q_BTNH[..., : self.key_dim], up_NHC[:, : self.key_dim])
        q_BTNC = jnp.concatenate([q_BTNC, q_BTNH[..., self.key_dim :]], axis=-1)
        seen_BMSC = cache[repeat][:, None].astype(x_BTD.dtype)
        keys_BS = jnp.broadcast_to(
            jnp.arange(cache.shape[2], dtype=jnp.int32)[None], seen_BMSC[:, 0, :, 0].shape
        )
        out_BTNC = attend_to_cache(
            q_BTNC, seen_BMSC, seen_BMSC[..., : self.latent], positions_BT, keys_BS, scale=self._score_scale
        )
        out_BTNV = jnp.einsum("btnc,nvc->btnv", out_BTNC, up_NHC[:, self.key_dim :])
        return self._output(params, out_BTNV, x_BTD), cache

    @property
    def _score_scale(self) -> float:
        return self.whole_key**-0.5 if self.scale is None else self.scale

    def _queries(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """(B, T, N, H), ready to attend."""
        if self.query_latent is None:
            q_BTQ = linear(x_BTD, params["q_proj"])
        else:
            narrow_BTA = linear(x_BTD, params["q_a_proj"], params.get("q_a_bias"))
            q_BTQ = linear(apply_norm(self.norm, narrow_BTA, params["q_a_norm"]), params["q_b_proj"])
        q_BTNH = q_BTQ.reshape(*q_BTQ.shape[:2], self.num_heads, self.whole_key)
        rotated = self._rotated(q_BTNH[..., self.key_dim :], context)
        q_BTNH = jnp.concatenate([q_BTNH[..., : self.key_dim], rotated], axis=-1)
        if self.growth is not None:
            times = jnp.floor(context.positions.astype(jnp.float32) / self.growth.length)
            growth_BT = 1 + self.growth.beta * jnp.log1p(times)
            q_BTNH = q_BTNH * growth_BT[:, :, None, None].astype(q_BTNH.dtype)
        return constrain(q_BTNH, "BTNH")

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
        kv_BTU = linear(kept_BTC[..., : self.latent], params["kv_b_proj"])
        kv_BTNU = constrain(kv_BTU.reshape(*kv_BTU.shape[:2], self.num_heads, -1), "BTN.")
        shared = kept_BTC[:, :, None, self.latent :]
        shared_BTNH = jnp.broadcast_to(shared, (*kv_BTNU.shape[:3], self.shared_dim))
        k_BTNH = constrain(jnp.concatenate([kv_BTNU[..., : self.key_dim], shared_BTNH], axis=-1), "BTNH")
        return attend(
            q_BTNH,
            k_BTNH,
            kv_BTNU[..., self.key_dim :],
            context.documents,
            scale=self._score_scale,
            device=context.device,
        )

    def _output(self, params: Tree, out_BTNV: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """What heads give (B, T, N, value width), gated by x where they are → (B, T, D)."""
        if self.head_gated:
            gate_BTN = jax.nn.sigmoid(linear(x_BTD, params["gate_proj"]).astype(jnp.float32))
            out_BTNV = out_BTNV * gate_BTN[..., None].astype(out_BTNV.dtype)
        return project_heads(out_BTNV, params["o_proj"], params.get("o_bias"))

    def rotations(self) -> frozenset[RopeSpec]:
        """Of queries and the key that heads share."""
        return frozenset() if self.rope is None else frozenset({self.rope})

    def mixing_flops(self, length: int) -> float:
        """N (H + H_v) T, as every head has keys and values of its own, half of which a query sees on average."""
        return self.num_heads * (self.whole_key + self.value_dim) * float(length)

    def problems(self) -> Iterator[str]:
        """Values that are too wide."""
        if self.value_dim > self.whole_key:
            yield (
                f"v_head_dim {self.value_dim} is more than qk_nope_head_dim {self.key_dim} and qk_rope_head_dim "
                f"{self.shared_dim} together: values wider than keys are not supported"
            )

    def describe(self) -> str:
        """Heads and latent widths."""
        queries = "" if self.query_latent is None else f", of queries {self.query_latent}"
        return (
            f"latent attention {self.num_heads} heads of {self.key_dim}+{self.shared_dim}, "
            f"latent {self.latent}{queries}"
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
        }
        yield from (text for text, holds in told.items() if holds)
        if self.rope is None:
            yield "no rope"
        else:
            yield from self.rope.traits(self.shared_dim)
