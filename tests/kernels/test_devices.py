"""What is known of a device. Those of a real topology are described where kernels are compiled for one."""

from types import SimpleNamespace

import jax
import pytest

from jaxmoe.kernels.devices import Device, describe, device_at_hand


def test_the_device_at_hand():
    assert device_at_hand() == Device("cpu", "cpu", multiprocessors=0, capability=None, present=True)
    assert {describe(device) for device in jax.devices()} == {device_at_hand()}, "of one kind"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"device_kind": "NVIDIA H100", "platform": "gpu", "compute_capability": "9.0", "core_count": 114},
            Device("NVIDIA H100", "gpu", 114, (9, 0), present=False),
        ),
        (
            {
                "device_kind": "NVIDIA B200",
                "platform": "gpu",
                "compute_capability": "10.0",
                "core_count": 148,
            },
            Device("NVIDIA B200", "gpu", 148, (10, 0), present=False),
        ),
        (
            {"device_kind": "MI300X", "platform": "gpu", "compute_capability": "gfx942", "core_count": 304},
            Device("MI300X", "gpu", 304, None, present=False),
        ),
        (
            {"device_kind": "TPU v5", "platform": "tpu", "core_count": 2},
            Device("TPU v5", "tpu", 0, None, present=False),
        ),
        (
            {"device_kind": "cpu", "platform": "cpu"},
            Device("cpu", "cpu", 0, None, present=False),
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Device) else "",
)
def test_devices_that_are_not_there(fields, expected):
    device = describe(SimpleNamespace(**fields))
    assert device == expected
    assert device.hopper == (device.kind == "NVIDIA H100")
