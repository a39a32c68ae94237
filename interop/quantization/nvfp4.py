"""NVFP4: two float4_e2m1 numbers to a byte, the low bits first, with two scales.

A float8_e4m3 one for each 16 numbers along a row, and a float32 one for the whole tensor, which multiplies those
(modelopt) or divides them (compressed-tensors).
"""

from jaxmoe.interop.quantization.arithmetic import LARGEST_NVFP4, NVFP4
from jaxmoe.interop.quantization.stored_form import COLUMNS, Part, QuantizedTensor, Whole, packed
from jaxmoe.interop.storage.format import TensorInfo

COLUMNS_PER_SCALE = 16
SCALES = ("F8_E4M3",)
WHOLE = ("F32",)


def nvfp4_tensor(name: str, codes: TensorInfo, scales: str, whole: str, *, divides: bool) -> QuantizedTensor:
    """The tensor of that name, of bytes (…, rows, columns / 2) and the scales of those names."""
    *lead, rows, width = codes.shape
    return QuantizedTensor(
        name,
        (*lead, rows, 2 * width),
        tuple(range(len(codes.shape))),
        NVFP4(),
        Part(codes.name, packing=packed(8, 4, COLUMNS)),
        Part(scales, (1, COLUMNS_PER_SCALE)),
        whole=Whole(Part(whole, (rows, 2 * width)), divides, LARGEST_NVFP4),
    )
