"""What is known of a device. One of a topology is described where kernels are compiled for it."""

import dataclasses

import jax
import pytest

from jaxmoe.kernels.devices import Device, _capability, describe, device_at_hand

H100 = Device("NVIDIA H100", "gpu", 132, (9, 0), present=False)


def test_the_device_at_hand():
    assert device_at_hand() == Device("cpu", "cpu", multiprocessors=0, capability=None, present=True)
    assert {describe(device) for device in jax.devices()} == {device_at_hand()}, "of one kind"


@pytest.mark.parametrize(
    ("text", "capability"),
    [("9.0", (9, 0)), ("10.0", (10, 0)), ("12.1", (12, 1)), ("gfx942", None), ("", None), ("9", None)],
)
def test_capability(text, capability):
    assert _capability(text) == capability
    assert dataclasses.replace(H100, capability=capability).hopper == (text == "9.0")
