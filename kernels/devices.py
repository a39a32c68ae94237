"""Devices, those at hand and those that a program is only compiled for."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What kernels have to know of a device.

    Attributes:
        kind: its name, such as "NVIDIA H200".
        platform: "gpu", "cpu" or "tpu".
        multiprocessors: of a GPU, 0 elsewhere.
        capability: compute capability of an NVIDIA GPU, such as (9, 0).
        present: whether this process, with those that it works with, can run on it; false for one that is only
            described.
    """

    kind: str
    platform: str
    multiprocessors: int
    capability: tuple[int, int] | None
    present: bool

    @property
    def hopper(self) -> bool:
        """Whether it has the instructions of compute capability 9.0."""
        return self.capability == (9, 0)


def describe(device: jax.Device) -> Device:
    """A device at hand, or one of a topology (`jax.experimental.topologies`), which is not present."""
    cores = getattr(device, "core_count", None) or 0
    return Device(
        kind=device.device_kind,
        platform=device.platform,
        multiprocessors=cores if device.platform == "gpu" else 0,
        capability=_capability(str(getattr(device, "compute_capability", ""))),
        present=_is_present(device),
    )


def device_at_hand() -> Device:
    """The first of those that jax computes on by default."""
    return describe(jax.devices()[0])


def _capability(text: str) -> tuple[int, int] | None:
    """Of "9.0"; none of what other makers' GPUs say instead, such as "gfx942"."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _is_present(device: jax.Device) -> bool:
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:  # there is no device of that platform
        return False
