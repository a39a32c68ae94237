"""Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.norms import rms_norm
from jaxmoe.model.rope import RopeSpec, apply_rope, rope_tables
from jaxmoe.params import Tree, param
from jaxmoe.sharding import BATCH_AXES, HeadsParam, axis_size, constrain, current_mesh

_logger = logging.getLogger(__name__)


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
        mask: (B, 1, T, S) bool, true within one document; None when every row begins with its only document.
            Its memory grows with the square of T. cuDNN takes it as a bias in the compute dtype of 2·T² bytes
            per row, 2 GiB at 32k tokens and 32 GiB at 131k, and jax 0.10.2 has its backward pass write as many
            for a gradient of the bias that nobody asks for. No public function of jax hands cuDNN the ends of
            documents instead.
        rope: cos and sin tables per distinct rotation.
    """

    mask: jax.Array | None
    rope: dict[RopeSpec, tuple[jax.Array, jax.Array]]


def sequence(
    specs: set[RopeSpec], positions: jax.Array, segment_ids: jax.Array | None, dtype: jnp.dtype
) -> Sequence:
    """Prepare positions (B, T) for all layers, and segment_ids (B, T) of packed rows."""
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

    def of_heads(dims: str) -> HeadsParam:
        return HeadsParam(**vars(param(dims, sizes)), num_heads=spec.num_heads)

    params: dict[str, Any] = {
        "q_proj": of_heads("QD"),
        "k_proj": param("UD", sizes),
        "v_proj": param("UD", sizes),
        "o_proj": of_heads("DQ"),
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
    q_BTNH, k_BTMH, v_BTMH = _project(_repeat_kv_heads(params, spec), spec, x_BTD)
    tables = sequence.rope[spec.rope]
    q_BTNH, k_BTMH = apply_rope(q_BTNH, tables), apply_rope(k_BTMH, tables)
    q_BTNH, k_BTMH, v_BTMH = (constrain(x, BATCH_AXES, None, "tensor") for x in (q_BTNH, k_BTMH, v_BTMH))
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=spec.head_dim**-0.5,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation=_implementation(q_BTNH, masked=sequence.mask is not None),
    )
    if jax.default_backend() == "cpu" and current_mesh() is None:
        out_BTNH = _row_by_row(attend, q_BTNH, k_BTMH, v_BTMH, sequence.mask)
    else:
        out_BTNH = attend(q_BTNH, k_BTMH, v_BTMH, mask=sequence.mask)
    out_BTQ = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    out_BTD = jnp.einsum("btq,dq->btd", out_BTQ, params["o_proj"])
    return out_BTD + params["o_bias"] if spec.bias else out_BTD


def _row_by_row(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """One row of the batch after the other, its scores computed again in the backward pass.

    The scores of one row stay in a CPU's cache, those of a batch go through memory. A training step of the quickstart's
    model takes 7 % less time so.
    """

    @jax.checkpoint
    def row(operands: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, mask = operands
        return attend(q, k, v, mask=mask)

    return jax.lax.map(row, (q, k, v, mask))


def _repeat_kv_heads(params: Tree, spec: AttentionSpec) -> Tree:
    """Repeat the weights of each key-value head until the mesh axis "tensor" divides their number M.

    cuDNN is called on each device with that device's heads: its queries need their own keys and values there.
    Weights are repeated and not activations, since they are what is small: every device projects its own heads,
    and what is exchanged does not grow with the batch.
    """
    repeats = math.lcm(spec.num_kv_heads, axis_size("tensor")) // spec.num_kv_heads
    if repeats == 1:
        return params

    def repeat(x: jax.Array) -> jax.Array:
        """(U, …) → (repeats * U, …)."""
        rest = ("fsdp",) if x.ndim == 2 else ()
        # Whole before it is cut differently: XLA cannot go from parts of heads to copies of heads by itself.
        heads = constrain(x, None, *rest).reshape(spec.num_kv_heads, spec.head_dim, *x.shape[1:])
        return constrain(jnp.repeat(heads, repeats, axis=0).reshape(-1, *x.shape[1:]), "tensor", *rest)

    of_heads = {"k_proj", "v_proj", "k_bias", "v_bias"} | ({"k_norm"} if spec.qk_norm == "full" else set())
    return params | {name: repeat(params[name]) for name in of_heads & params.keys()}


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


def _implementation(q_BTNH: jax.Array, masked: bool) -> Literal["cudnn", "xla"]:
    """cuDNN's flash attention where it takes the operands; otherwise the reason is logged once.

    XLA's own attention writes the (B, N, T, S) scores: at 2 x 4,096 tokens and 32 heads that is 10 GiB of
    temporaries against 0.14 GiB.
    """
    capability = _compute_capability()
    if capability is None:
        return "xla"
    reason = _cudnn_refuses(q_BTNH, masked, capability)
    if reason is None:
        return "cudnn"
    _log_once(f"attention goes through XLA, with memory for all {q_BTNH.shape[1]}² scores: {reason}")
    return "xla"


def _compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that computes, such as (9, 0); None on anything else."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _cudnn_refuses(q_BTNH: jax.Array, masked: bool, capability: tuple[int, int]) -> str | None:
    """Why cuDNN does not take these queries, after jax's own checks, which raise instead.

    Those also let widths over 128 through on GPUs after Hopper, where cuDNN has had no kernels for them.
    """
    length, width = q_BTNH.shape[1], q_BTNH.shape[3]
    widest = 256 if capability[0] == 9 else 128
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, the model computes in {q_BTNH.dtype}"
    if width > widest or width % 8:
        return f"cuDNN takes head widths up to {widest} in eights on this GPU, the model has {width}"
    if masked and length % 2:
        return f"cuDNN takes packed rows of even length, these have {length} tokens"
    return None


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
