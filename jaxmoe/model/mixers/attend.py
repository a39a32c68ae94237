"""Attention's scores and their weighted sum: which implementation, by the device that computes."""

import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxmoe.kernels.devices import Device, device_at_hand
from jaxmoe.kernels.logs import log_once
from jaxmoe.model.mixers.blockwise import blockwise_attention

_logger = logging.getLogger(__name__)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M values"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    selected_BTs: UInt8[Array, "B T bytes"] | None = None,
    device: Device | None = None,
) -> Float[Array, "B T N values"]:
    """softmax(scale · q kᵀ) v over the keys that a query sees: none later, of its own document, within the window.

    Args:
        q_BTNH: queries.
        k_BSMH: keys, S = T; M divides N.
        v_BSMH: values, of heads at most as wide as those of keys.
        segment_ids: (B, T) int32, the same number within one document; None where causality alone keeps documents
            apart.
        scale: factor of the scores.
        window: keys that a query sees, itself included; None sees all before it.
        sinks: (N,), one more logit per head, that attends to nothing.
        selected_BTs: of these keys those that a query may see, see `jaxmoe.model.mixers.selected_keys`; None for all.
            Each query must have one.
        device: that computes; None for the one at hand.

    Returns:
        (B, T, N, value width) in q's dtype.
    """
    device = device_at_hand() if device is None else device
    masked, sunk, chosen = (x is not None for x in (segment_ids, sinks, selected_BTs))
    if _implementation(q_BTNH, masked, sunk, device, chosen) == "cudnn":
        return _cudnn(q_BTNH, k_BSMH, v_BSMH, segment_ids, scale=scale, window=window)
    # A block's scores stay in a CPU's cache; on a GPU larger ones keep its multiprocessors busy.
    block = 512 if device.platform == "gpu" else 64 if q_BTNH.shape[1] <= 512 else 256
    return blockwise_attention(
        q_BTNH,
        k_BSMH,
        v_BSMH,
        segment_ids,
        scale=scale,
        window=window,
        sinks=sinks,
        selected_BTs=selected_BTs,
        block=block,
    )


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention, with values padded to the width of keys, which is all that it takes.

    It takes the mask of documents as a bias in the compute dtype of 2·T² bytes per row, 2 GiB at 32k tokens and
    32 GiB at 131k, and jax 0.10.2 has its backward pass write as many for a gradient of the bias that nobody asks
    for. No public function of jax hands cuDNN the ends of documents instead.
    """
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        q,
        k,
        jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, q.shape[-1] - v.shape[-1]),)),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[..., : v.shape[-1]]


def _implementation(
    q_BTNH: jax.Array, masked: bool, sinks: bool, device: Device, selected: bool = False
) -> Literal["cudnn", "blockwise"]:
    """On a GPU cuDNN's flash attention where it takes the operands; otherwise the reason is logged once."""
    if device.platform != "gpu" or device.capability is None:
        return "blockwise"
    reason = "cuDNN takes no selection of keys" if selected else _cudnn_refuses(q_BTNH, masked, sinks, device)
    if reason is None:
        return "cudnn"
    log_once(_logger, logging.WARNING, f"attention goes through XLA, block by block: {reason}")
    return "blockwise"


def _cudnn_refuses(q_BTNH: jax.Array, masked: bool, sinks: bool, device: Device) -> str | None:
    """Why cuDNN does not take these queries, after jax's own checks, which raise instead.

    Those also let widths over 128 through on GPUs after Hopper, where cuDNN has had no kernels for them; and they ask
    a GPU at hand, so that for one that is only described no more than 128 pass.
    """
    length, width = q_BTNH.shape[1], q_BTNH.shape[3]
    widest = 256 if device.present and device.capability is not None and device.capability[0] == 9 else 128
    if sinks:
        return "cuDNN takes no attention sinks"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, the model computes in {q_BTNH.dtype}"
    if width > widest or width % 8:
        return f"cuDNN takes head widths up to {widest} in eights on this GPU, the model has {width}"
    if masked and length % 2:
        return f"cuDNN takes packed rows of even length, these have {length} tokens"
    return None
