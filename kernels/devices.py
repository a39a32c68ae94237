"""Which device a computation is traced for."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        kind: its name, such as "NVIDIA H200".
        platform: "gpu", "cpu" or "tpu".
        multiprocessors: of a GPU, 0 elsewhere.
        hopper: whether it has the instructions of compute capability 9.0.
    """

    kind: str
    platform: str
    multiprocessors: int
    hopper: bool


def target_device() -> Device:
    """The device of the enclosing mesh if that says one (compiling for devices that are not there), else the first."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        kind, cores = described.device_kind, described.num_cores or 0
        is_gpu = "NVIDIA" in kind
        hopper = is_gpu and any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200"))
        return Device(kind, "gpu" if is_gpu else "other", cores, hopper)
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    cores = getattr(device, "core_count", 0) or 0
    return Device(
        device.device_kind, device.platform, cores, device.platform == "gpu" and capability == "9.0"
    )
