"""The datasheet's peak of a device, found by its name."""

import pytest

from jaxmoe.kernels.devices import Device
from jaxmoe.run import meter

pytestmark = pytest.mark.once  # A table of names.


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peak_by_the_name_of_the_device(kind, tflops):
    device = Device(kind, "gpu", 132, (9, 0), present=False)
    assert meter.peak_flops("bfloat16", device) == (tflops * 1e12, f"{kind}, datasheet")


def test_a_name_never_stands_before_one_that_it_is_part_of():
    names = list(meter.PEAK_TFLOPS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
