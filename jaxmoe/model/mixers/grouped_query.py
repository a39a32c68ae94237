"""Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.mixers.blockwise import blockwise_attention
from jaxmoe.model.mixers.rope import RopeSpec, apply_rope, rope_tables
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.model.precision import scaled
from jaxmoe.parallel.sharding import BATCH_AXES, axis_size, constrain, current_mesh
from jaxmoe.params import Param, Tree, param

_logger = logging.getLogger(__name__)


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
class AttentionSpec:
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

    @property
    def width_of_value(self) -> int:
        """Width of a value's head."""
        return self.value_dim or self.head_dim


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


def attention_params(spec: AttentionSpec, width: int) -> dict[str, Param]:
    """Declarations of one attention block for a model of `width`."""
    sizes = {
        "D": width,
        "H": spec.head_dim,
        "N": spec.num_heads,
        "Q": spec.num_heads * spec.head_dim,
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
    biases = {"q_bias": "Q", "k_bias": "U", "v_bias": "W"} if spec.bias else {}
    if spec.values_from_keys:
        biases.pop("v_bias", None)
    for name, letter in (biases | ({"o_bias": "D"} if spec.output_bias else {})).items():
        params[name] = param(letter, sizes, role="vector", init="zeros")
    if spec.qk_norm is not None:
        query, key = ("H", "H") if spec.qk_norm.over == "head" else ("Q", "U")
        params["q_norm"] = param(query, sizes, role="vector", init="ones")
        params["k_norm"] = param(key, sizes, role="vector", init="ones")
    if spec.sinks:
        # In float32, as the softmax that they take part in: some families say so, and it costs others nothing.
        params["sinks"] = param("N", sizes, role="vector", init="zeros", float32=True)
    return params


def attention(params: Tree, spec: AttentionSpec, x_BTD: jax.Array, sequence: Sequence) -> jax.Array:
    """x (B, T, D) → (B, T, D)."""
    q_BTNH, k_BTMH, v_BTMH = _project(_repeat_kv_heads(params, spec), spec, x_BTD, sequence)
    q_BTNH, k_BTMH, v_BTMH = (constrain(x, BATCH_AXES, None, "tensor") for x in (q_BTNH, k_BTMH, v_BTMH))
    attend = _attend(params, spec, q_BTNH, masked=sequence.mask is not None)
    if jax.default_backend() == "cpu" and current_mesh() is None:
        out_BTNH = _row_by_row(attend, q_BTNH, k_BTMH, v_BTMH, sequence.mask)
    else:
        out_BTNH = attend(q_BTNH, k_BTMH, v_BTMH, sequence.mask)
    out_BTP = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    if spec.gated:
        out_BTP = out_BTP * jax.nn.sigmoid(jnp.einsum("btd,pd->btp", x_BTD, params["gate_proj"]))
    out_BTD = jnp.einsum("btp,dp->btd", out_BTP, params["o_proj"])
    return out_BTD + params["o_bias"] if spec.output_bias else out_BTD


def _attend(
    params: Tree, spec: AttentionSpec, q_BTNH: jax.Array, masked: bool
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """The function of queries, keys, values and mask that gives what is attended to, (B, T, N, value width)."""
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    implementation = _implementation(q_BTNH, masked, spec.sinks)
    if implementation == "blockwise":
        return functools.partial(
            blockwise_attention, scale=scale, window=spec.window, sinks=params.get("sinks")
        )
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation=implementation,
    )

    def attend_padded(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Values as wide as keys, which is all that jax takes."""
        padded = jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, spec.head_dim - v.shape[-1]),))
        return attend(q, k, padded, mask=mask)[..., : v.shape[-1]]

    return attend_padded


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
        return attend(q, k, v, mask)

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
        """(heads of keys or values, …) → (repeats times as many, …)."""
        rest = ("fsdp",) if x.ndim == 2 else ()
        # Whole before it is cut differently: XLA cannot go from parts of heads to copies of heads by itself.
        heads = constrain(x, None, *rest).reshape(spec.num_kv_heads, -1, *x.shape[1:])
        return constrain(jnp.repeat(heads, repeats, axis=0).reshape(-1, *x.shape[1:]), "tensor", *rest)

    of_heads = {"k_proj", "v_proj", "k_bias", "v_bias"}
    if spec.qk_norm is not None and spec.qk_norm.over == "full":
        # The mean over the projection is that over its repeated heads.
        of_heads.add("k_norm")
    return params | {name: repeat(params[name]) for name in of_heads & params.keys()}


def _project(
    params: Tree, spec: AttentionSpec, x_BTD: jax.Array, sequence: Sequence
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, T, N, H), keys (B, T, M, H) and values (B, T, M, value width), ready to attend."""

    def project(name: str) -> jax.Array:
        out = jnp.einsum("btd,ud->btu", x_BTD, params[f"{name}_proj"])
        return out + params[f"{name}_bias"] if spec.bias else out

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
            x = apply_rope(spec.rope, x, sequence.rope[spec.rope])
        return normed(x, name, "head", True)

    projected_key = project("k")
    value = heads(projected_key if spec.values_from_keys else project("v"), spec.width_of_value)
    if spec.qk_norm is not None and spec.qk_norm.values:
        value = apply_norm(spec.qk_norm.norm, value, None)
    if spec.clip_qkv is not None:
        value = jnp.clip(value, -spec.clip_qkv, spec.clip_qkv)
    value = scaled(value, spec.value_scale)
    return query_or_key(project("q"), "q"), query_or_key(projected_key, "k"), value


def _implementation(q_BTNH: jax.Array, masked: bool, sinks: bool) -> Literal["cudnn", "xla", "blockwise"]:
    """On a GPU cuDNN's flash attention where it takes the operands; otherwise the reason is logged once.

    XLA's own attention writes the (B, N, T, S) scores: at 2 x 4,096 tokens and 32 heads that is 10 GiB of
    temporaries against 0.14 GiB.
    """
    capability = _compute_capability()
    if capability is None:
        return "blockwise" if sinks else "xla"
    reason = _cudnn_refuses(q_BTNH, masked, sinks, capability)
    if reason is None:
        return "cudnn"
    _log_once(f"attention goes through XLA, block by block: {reason}")
    return "blockwise"


def _compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that computes, such as (9, 0); None on anything else."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _cudnn_refuses(q_BTNH: jax.Array, masked: bool, sinks: bool, capability: tuple[int, int]) -> str | None:
    """Why cuDNN does not take these queries, after jax's own checks, which raise instead.

    Those also let widths over 128 through on GPUs after Hopper, where cuDNN has had no kernels for them.
    """
    length, width = q_BTNH.shape[1], q_BTNH.shape[3]
    widest = 256 if capability[0] == 9 else 128
    if sinks:
        return "cuDNN takes no attention sinks"
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
