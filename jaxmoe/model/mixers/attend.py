"""Attention's scores and their weighted sum: which implementation, by the device that computes."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe.kernels.devices import Device, device_at_hand
from jaxmoe.kernels.logs import log_once
from jaxmoe.model.mixers.blockwise import blockwise_attention
from jaxmoe.parallel.sharding import current_mesh

_logger = logging.getLogger(__name__)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M values"],
    mask: Bool[Array, "B 1 T S"] | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    device: Device | None = None,
) -> Float[Array, "B T N values"]:
    """softmax(scale · q kᵀ) v over the keys that a query sees: none later, of its own document, within the window.

    Args:
        q_BTNH: queries.
        k_BSMH: keys, S = T; M divides N.
        v_BSMH: values, of heads at most as wide as those of keys.
        mask: (B, 1, T, S) bool, true within one document; None where causality alone keeps documents apart.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
        sinks: (N,), one more logit per head, that attends to nothing.
        device: that computes; None for the one at hand.

    Returns:
        (B, T, N, value width) in q's dtype.
    """
    device = device_at_hand() if device is None else device
    implementation = _implementation(q_BTNH, mask is not None, sinks is not None, device)
    if implementation == "blockwise":
        chosen: Any = functools.partial(blockwise_attention, scale=scale, window=window, sinks=sinks)
    else:
        chosen = functools.partial(
            _fused, scale=scale, window=window, implementation=implementation, padded=q_BTNH.shape[-1]
        )
    if device.platform == "cpu" and current_mesh() is None:
        return _row_by_row(chosen, q_BTNH, k_BSMH, v_BSMH, mask)
    return chosen(q_BTNH, k_BSMH, v_BSMH, mask)


def _fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    implementation: Literal["cudnn", "xla"],
    padded: int,
) -> jax.Array:
    """jax's attention, with values padded to the width of keys, which is all that it takes."""
    out = jax.nn.dot_product_attention(
        q,
        k,
        jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, padded - v.shape[-1]),)),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out[..., : v.shape[-1]]


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


def _implementation(
    q_BTNH: jax.Array, masked: bool, sinks: bool, device: Device
) -> Literal["cudnn", "xla", "blockwise"]:
    """On a GPU cuDNN's flash attention where it takes the operands; otherwise the reason is logged once.

    XLA's own attention writes the (B, N, T, S) scores: at 2 x 4,096 tokens and 32 heads that is 10 GiB of
    temporaries against 0.14 GiB.
    """
    if device.platform != "gpu" or device.capability is None:
        return "blockwise" if sinks else "xla"
    reason = _cudnn_refuses(q_BTNH, masked, sinks, device.capability)
    if reason is None:
        return "cudnn"
    log_once(_logger, logging.WARNING, f"attention goes through XLA, block by block: {reason}")
    return "blockwise"


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
