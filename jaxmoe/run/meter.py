"""Model FLOPs, and the peak that they are measured against."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import RunConfig
from jaxmoe.model.feed_forward.moe import moe_params
from jaxmoe.model.spec import LayerSpec, ModelSpec, layer_params
from jaxmoe.params import count

PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 311.9,
    "L40S": 362.1,
    "RTX PRO 6000": 503.8,
}
"""Dense 16-bit matmul rate of one device from NVIDIA's datasheets, in 1e12 operations per second.

The first name that is part of the device's is taken, so longer ones stand before those that they contain.
"""


def active_params(spec: ModelSpec) -> int:
    """Parameters that one token is multiplied with: K of E experts, the output head, no embedding lookup."""
    per_layer: dict[LayerSpec, int] = {}
    for layer in spec.layers:
        if layer not in per_layer:
            total = count(layer_params(layer, spec.width))
            if layer.moe is not None:
                experts = moe_params(layer.moe, spec.width)["experts"]
                router = layer.moe.router
                total -= count(experts) * (router.num_experts - router.top_k) // router.num_experts
            per_layer[layer] = total
    return sum(per_layer[layer] for layer in spec.layers) + spec.vocab_size * spec.width


def train_flops_per_token(spec: ModelSpec, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 per active parameter, plus causal attention.

    Attention costs 6 N (H + H_v) t per layer, with H and H_v the widths of a key's and a value's head, and t the
    mean number of keys that a query sees: half the sequence, or the window (PaLM, arXiv 2204.02311, appendix B,
    halved for causality). Recomputation is not counted.
    """
    attention = 0.0
    for layer in spec.layers:
        window = layer.mixer.window or sequence_length
        keys = (
            sequence_length / 2
            if window >= sequence_length
            else window * (1 - window / (2 * sequence_length))
        )
        mixer = layer.mixer
        attention += 6.0 * mixer.num_heads * (mixer.head_dim + mixer.width_of_value) * keys
    return 6.0 * active_params(spec) + attention


def peak_flops(dtype: jnp.dtype) -> tuple[float, str]:
    """Peak of one device in FLOPs per second, and where the number is from.

    By the device's name for 16-bit computation on GPUs; for anything else (CPUs above all) the best of a few
    matmuls timed on the spot, so that utilisation is at least against something real.
    """
    kind = jax.devices()[0].device_kind
    if jnp.dtype(dtype).itemsize == 2:
        for name, tflops in PEAK_TFLOPS.items():
            if name in kind:
                return tflops * 1e12, f"{kind}, datasheet"
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best, f"{kind}, measured matmul"


class Meter:
    """Tokens per second and model FLOPs utilisation (MFU), step by step.

    Attributes:
        peak: FLOPs per second of one device that utilisation is measured against.
        peak_origin: where that number is from.
    """

    def __init__(self, spec: ModelSpec, dtype: jnp.dtype, config: RunConfig) -> None:
        if config.train.peak_tflops is None:
            self.peak, self.peak_origin = peak_flops(dtype)
        else:
            self.peak, self.peak_origin = config.train.peak_tflops * 1e12, "configured"
        self._flops_per_token = train_flops_per_token(spec, config.data.sequence_length)
        self.restart()

    def restart(self) -> None:
        """The next step begins now; what came before (an evaluation, a checkpoint) is not counted."""
        self._start = time.perf_counter()

    def after(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Wait for a step's metrics; its ``tokens_per_second``, ``mfu`` and ``seconds``."""
        tokens = float(metrics["tokens"])
        seconds = time.perf_counter() - self._start
        rate = tokens / seconds
        mfu = rate * self._flops_per_token / (self.peak * jax.device_count())
        return {"seconds": seconds, "tokens_per_second": rate, "mfu": mfu}
