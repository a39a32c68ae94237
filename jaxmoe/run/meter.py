"""Tokens per second, and the share of the devices' peak that the model's FLOPs are."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels.devices import Device
from jaxmoe.model.cost import train_flops_per_token
from jaxmoe.run.assemble import Assembled

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


def peak_flops(dtype: jnp.dtype, device: Device) -> tuple[float, str]:
    """Peak of one device in FLOPs per second, and where the number is from.

    By the device's name for 16-bit computation on GPUs; for anything else (CPUs above all) the best of a few
    matmuls timed on the spot, so that utilisation is at least against something real.

    Args:
        dtype: of the computation.
        device: the one at hand, or with a known name any.

    Raises:
        ValueError: nothing is known of the device, and it is not there to be measured.
    """
    if jnp.dtype(dtype).itemsize == 2:
        for name, tflops in PEAK_TFLOPS.items():
            if name in device.kind:
                return tflops * 1e12, f"{device.kind}, datasheet"
    if not device.present:
        raise ValueError(
            f"no peak is known of {device.kind} in {jnp.dtype(dtype).name}, and it is not here to measure"
        )
    size = 1024 if device.platform == "cpu" else 8192
    x = jnp.asarray(
        np.random.default_rng(0).random((size, size), np.float32) - 0.5, dtype
    )  # compiles nothing
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best, f"{device.kind}, measured matmul"


class Meter:
    """Tokens per second and model FLOPs utilisation (MFU), step by step.

    Attributes:
        peak: FLOPs per second of one device that utilisation is measured against.
        peak_origin: where that number is from.
    """

    def __init__(self, assembled: Assembled) -> None:
        config = assembled.config
        if config.train.peak_tflops is None:
            self.peak, self.peak_origin = peak_flops(assembled.dtype, assembled.device)
        else:
            self.peak, self.peak_origin = config.train.peak_tflops * 1e12, "configured"
        self._flops_per_token = train_flops_per_token(
            assembled.spec, config.data.sequence_length, base_trains=assembled.adapted is None
        )
        self._devices = assembled.mesh.size
        self.restart()

    def restart(self) -> None:
        """The next step begins now; what came before (an evaluation, a checkpoint) is not counted."""
        self._start = time.perf_counter()
        self._reading = 0.0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what waits for data."""
        begun = time.perf_counter()
        yield
        self._reading += time.perf_counter() - begun

    def after(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Wait for a step's metrics; its ``tokens_per_second``, ``mfu``, ``seconds`` and ``data_seconds``.

        The last are those in which the next batch was waited for, mostly while the devices computed.
        """
        tokens = float(metrics["tokens"])
        seconds = time.perf_counter() - self._start
        rate = tokens / seconds
        mfu = rate * self._flops_per_token / (self.peak * self._devices)
        return {"seconds": seconds, "data_seconds": self._reading, "tokens_per_second": rate, "mfu": mfu}
