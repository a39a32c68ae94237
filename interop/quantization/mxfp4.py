"""MXFP4 (OCP Microscaling Formats 1.0) as gpt-oss stores it: 32 numbers of 4 bits along a row share a power of two.

``X_blocks`` (U8, E × out × in/32 × 16, the low four bits of a byte first) and ``X_scales`` (U8, E × out × in/32): a
number is its code's value times 2^(scale - 127), and ``X`` is E × in × out.
"""

from collections.abc import Mapping
from typing import Any, Self

from jaxmoe.interop.quantization.arithmetic import MXFP4
from jaxmoe.interop.quantization.stored_form import (
    COLUMNS,
    Part,
    QuantizedTensor,
    check_fields,
    packed,
    part_problems,
    there_twice,
)
from jaxmoe.interop.storage.reader import CheckpointFolder

_BLOCKS, _SCALES = "_blocks", "_scales"
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
_COLUMNS = 32
_BYTES = _COLUMNS // 2
_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


class MXFP4Experts:
    """The format."""

    expected = f"U8 weights X{_BLOCKS} with X{_SCALES}"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown.
        """
        check_fields(given, where, _KNOWN, {})
        return cls()

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        tensors = stored.tensors
        found, hidden = [], set()
        for name, info in tensors.items():
            if name.endswith(_SCALES):
                hidden.add(name)
                blocks = name.removesuffix(_SCALES) + _BLOCKS
                if blocks not in tensors:
                    problems.append(f"tensor {name} has scales, but there is no {blocks}")
            if not name.endswith(_BLOCKS):
                continue
            hidden.add(name)
            plain = name.removesuffix(_BLOCKS)
            if plain in tensors:
                problems.append(there_twice(plain, name))
            elif len(info.shape) != 4 or info.shape[-1] != _BYTES or 0 in info.shape or info.dtype != "U8":
                problems.append(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, expected U8 of shape "
                    f"[experts, out, in / {_COLUMNS}, {_BYTES}]"
                )
            else:
                experts, rows, groups, _ = info.shape
                tensor = mxfp4_tensor(plain, (experts, groups * _COLUMNS, rows))
                found.append(tensor)
                problems += part_problems(
                    tensors, tensor.scales, "scales", name, tensor.stored_shape, ("U8",)
                )
        return found, frozenset(hidden)


def mxfp4_tensor(name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """The tensor that has that name and that shape (E, in, out) without quantisation."""
    codes = Part(name + _BLOCKS, packing=packed(8, 4, COLUMNS), fold=_BYTES)
    return QuantizedTensor(name, shape, (0, 2, 1), MXFP4(), codes, Part(name + _SCALES, (1, _COLUMNS)))


def is_mxfp4(name: str, shape: tuple[int, ...]) -> bool:
    """Whether gpt-oss has a tensor so: the matrices of its experts."""
    return len(shape) == 3 and name.endswith(_EXPERTS) and shape[1] % _COLUMNS == 0
