"""Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.norms import rms_norm
from jaxmoe.model.rope import RopeSpec, apply_rope, rope_tables
from jaxmoe.params import Tree, param
from jaxmoe.sharding import BATCH_AXES, constrain


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Causal grouped-query attention.

    Attributes:
        qk_norm: RMSNorm on queries and keys before the rotation: "head" normalises each head of width H with
            one shared scale, "full" the whole projection before it is split into heads.
        bias: biases on all four projections.
        window: keys that a query sees, itself included; None sees all before it.
        clip_qkv: clamp queries, keys and values to ±clip_qkv after the norms.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    norm_eps: float
    qk_norm: Literal["none", "head", "full"] = "none"
    bias: bool = False
    window: int | None = None
    clip_qkv: float | None = None


@dataclasses.dataclass(frozen=True)
class Sequence:
    """What attention needs to know of the batch, computed once and shared by all layers.

    Attributes:
        mask: (B, 1, T, S) bool, true within one document; None when every row is one document.
        rope: cos and sin tables per distinct rotation.
    """

    mask: jax.Array | None
    rope: dict[RopeSpec, tuple[jax.Array, jax.Array]]


def sequence(
    specs: set[RopeSpec], positions: jax.Array, segment_ids: jax.Array | None, dtype: jnp.dtype
) -> Sequence:
    """Prepare positions (B, T) and segment_ids (B, T) for all layers."""
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return Sequence(mask, {spec: rope_tables(spec, positions, dtype) for spec in specs})


def attention_params(spec: AttentionSpec, width: int) -> Tree:
    """Declarations of one attention block for a model of `width`."""
    sizes = {
        "D": width,
        "H": spec.head_dim,
        "Q": spec.num_heads * spec.head_dim,
        "U": spec.num_kv_heads * spec.head_dim,
    }
    params = {
        "q_proj": param("QD", sizes),
        "k_proj": param("UD", sizes),
        "v_proj": param("UD", sizes),
        "o_proj": param("DQ", sizes),
    }
    if spec.bias:
        for name, letter in {"q_bias": "Q", "k_bias": "U", "v_bias": "U", "o_bias": "D"}.items():
            params[name] = param(letter, sizes, role="vector", init="zeros")
    if spec.qk_norm != "none":
        query, key = ("H", "H") if spec.qk_norm == "head" else ("Q", "U")
        params["q_norm"] = param(query, sizes, role="vector", init="ones")
        params["k_norm"] = param(key, sizes, role="vector", init="ones")
    return params


def attention(params: Tree, spec: AttentionSpec, x_BTD: jax.Array, sequence: Sequence) -> jax.Array:
    """x (B, T, D) → (B, T, D)."""
    q_BTNH, k_BTMH, v_BTMH = _project(params, spec, x_BTD)
    tables = sequence.rope[spec.rope]
    q_BTNH, k_BTMH = apply_rope(q_BTNH, tables), apply_rope(k_BTMH, tables)
    q_BTNH, k_BTMH, v_BTMH = (constrain(x, BATCH_AXES, None, "tensor") for x in (q_BTNH, k_BTMH, v_BTMH))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTMH,
        v_BTMH,
        mask=sequence.mask,
        scale=spec.head_dim**-0.5,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation=_implementation(q_BTNH),
    )
    out_BTQ = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    out_BTD = jnp.einsum("btq,dq->btd", out_BTQ, params["o_proj"])
    return out_BTD + params["o_bias"] if spec.bias else out_BTD


def _project(params: Tree, spec: AttentionSpec, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, T, N, H), keys and values (B, T, M, H): normed and clipped, not yet rotated."""
    q = jnp.einsum("btd,qd->btq", x_BTD, params["q_proj"])
    k = jnp.einsum("btd,ud->btu", x_BTD, params["k_proj"])
    v = jnp.einsum("btd,ud->btu", x_BTD, params["v_proj"])
    if spec.bias:
        q, k, v = q + params["q_bias"], k + params["k_bias"], v + params["v_bias"]

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, spec.head_dim)

    if spec.qk_norm == "full":
        q, k = rms_norm(q, params["q_norm"], spec.norm_eps), rms_norm(k, params["k_norm"], spec.norm_eps)
    q, k, v = heads(q), heads(k), heads(v)
    if spec.qk_norm == "head":
        q, k = rms_norm(q, params["q_norm"], spec.norm_eps), rms_norm(k, params["k_norm"], spec.norm_eps)
    if spec.clip_qkv is not None:
        q, k, v = (jnp.clip(x, -spec.clip_qkv, spec.clip_qkv) for x in (q, k, v))
    return q, k, v


def _implementation(q: jax.Array) -> Literal["cudnn", "xla"]:
    """cuDNN's flash attention where it takes the shape: NVIDIA GPUs, 16-bit, heads of ≤ 128 in eights, even length.

    XLA's own attention writes the (B, N, T, S) scores: at 2 x 4,096 tokens and 32 heads that is 10 GiB of
    temporaries against 0.14 GiB.
    """
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and q.shape[1] % 2 == 0
    return "cudnn" if jax.default_backend() == "gpu" and sixteen_bit and fits else "xla"
