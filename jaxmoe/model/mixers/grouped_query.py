"""Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.blocks import Mixer
from jaxmoe.model.linear import linear, on_rows
from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.heads import project_heads
from jaxmoe.model.mixers.kv_cache import KVCache, attend_to_cache
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.model.precision import scaled
from jaxmoe.parallel.sharding import axis_size, constrain
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """A norm on queries and keys.

    Attributes:
        norm: which.
        over: "head" normalises each head of width H with one shared scale, "full" the whole projection before it
            is split into heads.
        after_rope: normalise what is already rotated.
        values: values get the same norm, without a scale.
    """

    norm: NormSpec
    over: Literal["head", "full"]
    after_rope: bool = False
    values: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionSpec(Mixer):
    """Causal grouped-query attention.

    Attributes:
        rope: rotation of queries and keys; None leaves positions out.
        qk_norm: norm on queries and keys.
        bias: biases on the projections to queries, keys and values.
        output_bias: a bias on the output projection.
        window: keys that a query sees, itself included; None sees all before it.
        clip_qkv: clamp queries, keys and values to ±clip_qkv after the norms.
        scale: factor of the scores; by default 1/sqrt(head_dim).
        value_dim: width of a value's head, at most head_dim, which it is by default.
        value_scale: factor of the values.
        values_from_keys: there is no projection to values, they are the projected keys (before norm and rotation).
        sinks: every query head has one more logit in the softmax, a parameter, that attends to nothing
            (Xiao et al., arXiv 2309.17453, as in gpt-oss, arXiv 2508.10925).
        gated: the output is multiplied by sigmoid(gate_proj(x)) before the output projection
            (Qiu et al., arXiv 2505.06708).
        query_gated: the same, with the gate's rows among those of q_proj: a head's follow those of its query.
        head_gated: the same, with one number per head.
        gate_activation: what takes the place of the sigmoid; "softplus" is taken in float32.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    qk_norm: QKNorm | None = None
    bias: bool = False
    output_bias: bool = False
    window: int | None = None
    clip_qkv: float | None = None
    scale: float | None = None
    value_dim: int | None = None
    value_scale: float = 1.0
    values_from_keys: bool = False
    sinks: bool = False
    gated: bool = False
    query_gated: bool = False
    head_gated: bool = False
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"

    @property
    def width_of_value(self) -> int:
        """Width of a value's head."""
        return self.value_dim or self.head_dim

    def params(self, width: int) -> Tree:
        """{"attention": …}."""
        return {"attention": _declared(self, width)}

    def apply(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """x (B, T, D) → (B, T, D)."""
        params = params["attention"]
        q_BTNH, k_BTMH, v_BTMH, gate = self._heads(params, x_BTD, context)
        out_BTNH = attend(
            q_BTNH, k_BTMH, v_BTMH, context.documents, device=context.device, **self._scores(params)
        )
        return self._output(params, gate, out_BTNH)

    def init_cache(self, repeats: int, batch: int, length: int, dtype: Any) -> KVCache:
        """Of keys, rotated, and values."""
        heads = math.lcm(self.num_kv_heads, axis_size("tensor"))
        k_shape, v_shape = (
            (repeats, batch, heads, length, width) for width in (self.head_dim, self.width_of_value)
        )
        return KVCache.empty(k_shape, v_shape, dtype)

    def decode(
        self, params: Tree, x_BTD: jax.Array, context: Context, cache: KVCache, repeat: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """x (B, T, D) → (B, T, D), with attention to what is cached, and the cache with the keys and values of x."""
        params = params["attention"]
        q_BTNH, k_BTMH, v_BTMH, gate = self._heads(params, x_BTD, context)
        positions_BT = context.positions
        cache = cache.written(repeat, positions_BT, k_BTMH, v_BTMH)
        if context.fresh:
            out_BTNH = attend(
                q_BTNH, k_BTMH, v_BTMH, context.documents, device=context.device, **self._scores(params)
            )
        else:
            k_BMSH, v_BMSH, keys_BS = cache.seen(repeat, positions_BT, self.window, x_BTD.dtype)
            out_BTNH = attend_to_cache(q_BTNH, k_BMSH, v_BMSH, positions_BT, keys_BS, **self._scores(params))
        return self._output(params, gate, out_BTNH), cache

    def _heads(
        self, params: Tree, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """As `_project`, where the mesh has them."""
        repeated = _repeat_kv_heads(params, self, x_BTD.dtype)
        q_BTNH, k_BTMH, v_BTMH, gate = _project(repeated, self, x_BTD, context)
        return constrain(q_BTNH, "BTNH"), constrain(k_BTMH, "BTMH"), constrain(v_BTMH, "BTMH"), gate

    def _scores(self, params: Tree) -> dict[str, Any]:
        """What scores are made with, and which count."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return {"scale": scale, "window": self.window, "sinks": params.get("sinks")}

    def _output(self, params: Tree, gate: jax.Array | None, out_BTNH: jax.Array) -> jax.Array:
        """What heads give (B, T, N, value width) → (B, T, D); the gate is (B, T, N) or (B, T, P)."""
        bias = params["o_bias"] if self.output_bias else None
        if gate is None:
            return project_heads(out_BTNH, params["o_proj"], bias)
        if self.gate_activation == "softplus":
            gate = jax.nn.softplus(gate.astype(jnp.float32)).astype(gate.dtype)
        else:
            gate = jax.nn.sigmoid(gate)
        if self.head_gated:
            return project_heads(out_BTNH * gate[..., None], params["o_proj"], bias)
        return linear(out_BTNH.reshape(gate.shape) * gate, params["o_proj"], bias)

    def rotations(self) -> frozenset[RopeSpec]:
        """Of queries and keys."""
        return frozenset() if self.rope is None else frozenset({self.rope})

    def mixing_flops(self, length: int) -> float:
        """2 N (H + H_v) t, with H and H_v the widths of a key's and a value's head and t the mean number of keys that
        a query sees: half the sequence, or the window (PaLM, arXiv 2204.02311, appendix B, halved for causality)."""
        window = self.window or length
        keys = length / 2 if window >= length else window * (1 - window / (2 * length))
        return 2.0 * self.num_heads * (self.head_dim + self.width_of_value) * keys

    def problems(self) -> Iterator[str]:
        """Heads that do not divide, windows that are none, values that are too wide."""
        heads, kv_heads, window = self.num_heads, self.num_kv_heads, self.window
        if heads % kv_heads:
            yield f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
        if window is not None and (isinstance(window, bool) or window < 1):
            yield f"sliding_window = {window}: expected a positive integer or null"
        if self.width_of_value > self.head_dim:
            yield (
                f"values of width {self.width_of_value} are wider than keys, {self.head_dim}: that is not supported"
            )

    def describe(self) -> str:
        """Heads and window."""
        window = "" if self.window is None else f", window {self.window}"
        return f"attention {self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}{window}"

    def traits(self) -> Iterator[str]:
        """In the order of the table of models in the README."""
        if self.qk_norm is not None:
            where = " after rope" if self.qk_norm.after_rope else ""
            yield f"q/k norm per head{where}" if self.qk_norm.over == "head" else f"q/k norm in full{where}"
            if self.qk_norm.values:
                yield "value norm"
        told = {
            "biases": self.bias or self.output_bias,
            "windows": self.window is not None,
            "clipped": self.clip_qkv is not None,
            "sinks": self.sinks,
            "gate": self.gated or self.query_gated,
            "gated heads": self.head_gated,
            "softplus gate": self.gate_activation == "softplus",
            "values from keys": self.values_from_keys,
            "narrower values": self.width_of_value != self.head_dim,
            "scaled values": self.value_scale != 1.0,
            "own score scale": self.scale is not None,
            "no rope in some layers": self.rope is None,
        }
        yield from (text for text, holds in told.items() if holds)
        if self.rope is not None:
            yield from self.rope.traits(self.head_dim)


def _declared(spec: AttentionSpec, width: int) -> dict[str, Param]:
    sizes = {
        "D": width,
        "H": spec.head_dim,
        "N": spec.num_heads,
        "Q": spec.num_heads * spec.head_dim * (2 if spec.query_gated else 1),
        "U": spec.num_kv_heads * spec.head_dim,
        "W": spec.num_kv_heads * spec.width_of_value,
        "P": spec.num_heads * spec.width_of_value,
    }
    of_heads = functools.partial(param, sizes=sizes, num_heads=spec.num_heads)
    params = {"q_proj": of_heads("QD"), "k_proj": param("UD", sizes)}
    if not spec.values_from_keys:
        params["v_proj"] = param("WD", sizes)
    params["o_proj"] = of_heads("DP")
    if spec.gated:
        params["gate_proj"] = of_heads("PD")
    if spec.head_gated:
        params["gate_proj"] = param("ND", sizes)
    biases = {"q_bias": "Q", "k_bias": "U", "v_bias": "W"} if spec.bias else {}
    if spec.values_from_keys:
        biases.pop("v_bias", None)
    for name, letter in (biases | ({"o_bias": "D"} if spec.output_bias else {})).items():
        params[name] = param(letter, sizes, role="vector", init="zeros")
    if spec.qk_norm is not None:
        query, key = ("H", "H") if spec.qk_norm.over == "head" else ("Q", "U")
        params["q_norm"] = param(query, sizes, role="vector", init=spec.qk_norm.norm.initial)
        params["k_norm"] = param(key, sizes, role="vector", init=spec.qk_norm.norm.initial)
    if spec.sinks:
        # In float32, as the softmax that they take part in: some families say so, and it costs others nothing.
        params["sinks"] = param("N", sizes, role="vector", init="zeros", float32=True)
    return params


def _repeat_kv_heads(params: Tree, spec: AttentionSpec, dtype: Any) -> Tree:
    """Repeat the weights of each key-value head until the mesh axis "tensor" divides their number M.

    cuDNN is called on each device with that device's heads: its queries need their own keys and values there.
    Weights are repeated and not activations, since they are what is small: every device projects its own heads,
    and what is exchanged does not grow with the batch.
    """
    repeats = math.lcm(spec.num_kv_heads, axis_size("tensor")) // spec.num_kv_heads
    if repeats == 1:
        return params

    def repeat(x: jax.Array, letters: str) -> jax.Array:
        """(heads of keys or values, …) → (repeats times as many, …)."""
        # Whole before it is cut differently: XLA cannot go from parts of heads to copies of heads by itself.
        heads = constrain(x, "." + letters[1:]).reshape(spec.num_kv_heads, -1, *x.shape[1:])
        return constrain(jnp.repeat(heads, repeats, axis=0).reshape(-1, *x.shape[1:]), letters)

    repeated: dict[str, Any] = {
        name: on_rows(params[name], repeat, letters, dtype)
        for name, letters in (("k_proj", "UD"), ("v_proj", "WD"))
        if name in params
    }
    of_heads = {"k_bias": "U", "v_bias": "W"}
    if spec.qk_norm is not None and spec.qk_norm.over == "full":
        # The mean over the projection is that over its repeated heads.
        of_heads["k_norm"] = "U"
    repeated |= {name: repeat(params[name], letter) for name, letter in of_heads.items() if name in params}
    return params | repeated


def _project(
    params: Tree, spec: AttentionSpec, x_BTD: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries (B, T, N, H), keys (B, T, M, H) and values (B, T, M, value width), ready to attend, and the gate of the
    output (B, T, P), or (B, T, N) of heads, before its activation, where there is one."""

    def project(name: str) -> jax.Array:
        return linear(x_BTD, params[f"{name}_proj"], params[f"{name}_bias"] if spec.bias else None)

    def heads(x: jax.Array, width: int) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, width)

    def normed(x: jax.Array, name: str, over: str, after_rope: bool) -> jax.Array:
        if spec.qk_norm is None or (spec.qk_norm.over, spec.qk_norm.after_rope) != (over, after_rope):
            return x
        return apply_norm(spec.qk_norm.norm, x, params[f"{name}_norm"])

    def query_or_key(x: jax.Array, name: str) -> jax.Array:
        x = normed(heads(normed(x, name, "full", False), spec.head_dim), name, "head", False)
        if spec.clip_qkv is not None:
            x = jnp.clip(x, -spec.clip_qkv, spec.clip_qkv)
        if spec.rope is not None:
            x = apply_rope(spec.rope, x, context.rotations[spec.rope])
        return normed(x, name, "head", True)

    projected_key = project("k")
    value = heads(projected_key if spec.values_from_keys else project("v"), spec.width_of_value)
    if spec.qk_norm is not None and spec.qk_norm.values:
        value = apply_norm(spec.qk_norm.norm, value, None)
    if spec.clip_qkv is not None:
        value = jnp.clip(value, -spec.clip_qkv, spec.clip_qkv)
    value = scaled(value, spec.value_scale)
    projected_query = project("q")
    gate = linear(x_BTD, params["gate_proj"]) if spec.gated or spec.head_gated else None
    if spec.query_gated:
        both = heads(projected_query, 2 * spec.head_dim)
        projected_query, gate = (half.reshape(*x_BTD.shape[:2], -1) for half in jnp.split(both, 2, axis=-1))
    return query_or_key(projected_query, "q"), query_or_key(projected_key, "k"), value, gate
