"""Which tensors a quantised checkpoint has in few bits, told from its config alone, for a plan without its files."""

from collections.abc import Mapping

from jaxmoe.interop.quantization.arithmetic import FP8
from jaxmoe.interop.quantization.fp8 import SCALES_ENDING, FP8Weights
from jaxmoe.interop.quantization.mxfp4 import MXFP4Experts, is_mxfp4, mxfp4_tensor
from jaxmoe.interop.quantization.stored_form import Format, Part, QuantizedTensor
from jaxmoe.interop.rules import Binding, Bindings


def expected_tensors(format: Format, bindings: Bindings) -> Mapping[str, QuantizedTensor]:
    """Quantised tensors by name, as the makers of checkpoints have them: MXFP4 of experts; FP8 in blocks of the linear
    layers' and experts' matrices. Of other formats none.
    """
    found = {}
    for name, binding in bindings.of_tensor.items():
        if isinstance(format, MXFP4Experts) and is_mxfp4(name, binding.shape):
            found[name] = mxfp4_tensor(name, binding.shape)
        elif isinstance(format, FP8Weights) and format.block is not None and _is_linear(binding):
            order = tuple(range(len(binding.shape)))
            scales = Part(name + SCALES_ENDING, format.block)
            found[name] = QuantizedTensor(name, binding.shape, order, FP8(format.powers), Part(name), scales)
    return found


def _is_linear(binding: Binding) -> bool:
    return binding.declared.role == "matrix" and binding.target.startswith("groups.")
