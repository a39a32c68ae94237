"""The formats of NVIDIA's modelopt: NVFP4 and FP8, which may both be in one folder.

- NVFP4: ``X`` (U8, out × in / 2), ``X_scale`` (F8_E4M3, out × in / 16) and ``X_scale_2`` (F32, one), which multiplies;
- FP8: ``X`` (F8_E4M3, out × in) and ``X_scale`` (F32, one, or one per row).

config.json says so, or hf_quant_config.json beside it. The scales of activations (``input_scale``) and of the key-value
cache (``k_scale``, ``v_scale``) change nothing in bfloat16.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.fp8 import CODES, fp8_tensor
from jaxmoe.interop.quantization.nvfp4 import COLUMNS_PER_SCALE, SCALES, WHOLE, nvfp4_tensor
from jaxmoe.interop.quantization.stored_form import QuantizedTensor, check_fields, found_parts, part_problems
from jaxmoe.interop.storage.reader import CheckpointFolder

_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
_INERT = (".input_scale", ".k_scale", ".v_scale")
_ENDINGS = (".weight_scale", ".weight_scale_2")
_KNOWN = frozenset(
    {
        "quant_method",
        "config_groups",
        "ignore",
        "exclude_modules",
        "quantized_layers",
        "kv_cache_scheme",
        "kv_cache_quant_algo",
        "producer",
    }
)
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "quant_algo": _ALGORITHMS,
    "group_size": (COLUMNS_PER_SCALE, None),
    "pre_quant_scale": (False, None),
    "has_zero_point": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Modelopt:
    """The formats; which of them a tensor has, its dtype says."""

    expected = f"U8 or {CODES} weights X with X_scale"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``, or ``quantization`` of hf_quant_config.json.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        inner = given.get("quantization")
        if inner is not None:
            if not isinstance(inner, dict):
                raise UserError(
                    f"{where}.quantization = {quote(inner)}: expected an object with a quant_algo"
                )
            given = {name: value for name, value in given.items() if name != "quantization"} | inner
        check_fields(given, where, _KNOWN, _CHOICES)
        return cls()

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        tensors = stored.tensors
        found: list[QuantizedTensor] = []
        hidden = {name for name in tensors if name.endswith(_INERT)}
        for name, info in tensors.items():
            if not name.endswith(".weight") or info.dtype not in ("U8", CODES):
                continue
            hidden.add(name)
            if info.dtype == CODES:
                tensor = fp8_tensor(tensors, info, f"{name}_scale", None, ("F32", "BF16"), problems)
            elif len(info.shape) < 2 or 0 in info.shape:
                problems.append(f"tensor {name} has shape {list(info.shape)}, expected matrices of bytes")
                continue
            else:
                tensor = nvfp4_tensor(name, info, f"{name}_scale", f"{name}_scale_2", divides=False)
                shape, whole = tensor.stored_shape, tensor.whole
                problems += part_problems(tensors, tensor.scales, "scales", name, shape, SCALES)
                if whole is not None:
                    problems += part_problems(tensors, whole.part, "scale of all", name, shape, WHOLE)
            found.append(tensor)
            hidden |= tensor.names
        return found, found_parts(tensors, hidden, _ENDINGS, problems)
