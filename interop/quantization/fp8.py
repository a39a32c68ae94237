"""FP8: float8_e4m3 codes with one scale per block of a matrix, as DeepSeek-V3 introduced it (arXiv 2412.19437), per row
or for all of it.

``X`` (F8_E4M3, out × in) and ``X_scale_inv``: a number is its code times the scale of its block, in float32, rounded to
bfloat16. With ``weight_block_size`` the scales are (ceil(out / rows) × ceil(in / columns)); without it their shape says
what shares one, () or (1) all and (out × 1) a row, and they may also be called ``X_scale``. Scales of activations
(``activation_scheme: static``) change nothing in bfloat16.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.arithmetic import FP8
from jaxmoe.interop.quantization.stored_form import (
    Part,
    QuantizedTensor,
    check_fields,
    is_size,
    part_problems,
    same_but_ones,
)
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

CODES = "F8_E4M3"
SCALES = ("F32", "BF16", "F8_E8M0")
SCALES_ENDING = "_scale_inv"
_ENDINGS = (SCALES_ENDING, "_scale")
_INERT = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")

# Which tensors are quantised, their own dtypes say; how activations would be, does not matter in bfloat16.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic", "static", None),
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
}
_KNOWN = frozenset(
    {
        "quant_method",
        "weight_block_size",
        "modules_to_not_convert",
        "modules_to_convert",
        "ignored_layers",
        "dequantize",
        "kv_cache_scheme",
    }
)


@dataclasses.dataclass(frozen=True)
class FP8Weights:
    """The format, in blocks of one size or as the shapes of the scales say.

    Attributes:
        block: rows and columns that share a scale, or None.
        powers: scales are powers of two.
    """

    block: tuple[int, int] | None
    powers: bool = False

    expected = f"{CODES} weights X with X{_ENDINGS[0]}"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        check_fields(given, where, _KNOWN, _CHOICES)
        block = given.get("weight_block_size")
        if block is not None and (
            not isinstance(block, list | tuple) or len(block) != 2 or not all(map(is_size, block))
        ):
            raise UserError(
                f"{where}.weight_block_size = {quote(block)}: expected two positive integers, rows and columns of a "
                "block, or no such field for one scale per row or per tensor"
            )
        return cls(None if block is None else (block[0], block[1]), given.get("scale_fmt") == "ue8m0")

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        tensors = stored.tensors
        endings = _ENDINGS[:1] if self.block is not None else _ENDINGS
        found, hidden = [], {name for name in tensors if name.endswith(_INERT)}
        for name, info in tensors.items():
            if info.dtype == CODES:
                there = [name + ending for ending in endings if name + ending in tensors]
                hidden |= {name, *there}
                if len(there) > 1:
                    problems.append(f"tensor {name} has scales twice, {' and '.join(there)}: expected one")
                scales = (there or [name + endings[0]])[0]
                tensor = fp8_tensor(tensors, info, scales, self.block, SCALES, problems)
                found.append(dataclasses.replace(tensor, arithmetic=FP8(self.powers)))
        for name in tensors.keys() - hidden:
            ending = next((one for one in endings if name.endswith(f".weight{one}")), None)
            if ending is None and not name.endswith(_ENDINGS[0]):
                continue
            stem = name.removesuffix(ending or _ENDINGS[0])
            hidden.add(name)
            if stem not in tensors:
                problems.append(f"tensor {name} has scales, but there is no {stem}")
            else:
                problems.append(
                    f"tensor {stem} has dtype {tensors[stem].dtype}, expected {CODES}: {name} has scales of it"
                )
        return found, frozenset(hidden)


def fp8_tensor(
    tensors: Mapping[str, TensorInfo],
    codes: TensorInfo,
    scales: str,
    block: tuple[int, int] | None,
    dtypes: Sequence[str],
    problems: list[str],
) -> QuantizedTensor:
    """A tensor of FP8 codes and the scales of that name; what is wrong with it is appended to `problems`.

    Without a `block` the shape of the scales says what shares one.
    """
    shape, order = codes.shape, tuple(range(len(codes.shape)))
    if len(shape) < 2 or 0 in shape:
        problems.append(f"tensor {codes.name} has shape {list(shape)}, expected matrices to have scales of")
        return QuantizedTensor(codes.name, shape, order, FP8(), Part(codes.name), Part(scales))
    there = tensors.get(scales)
    part = Part(scales, block or (shape[-2], shape[-1]))
    row = Part(scales, (1, shape[-1]))
    if block is None and there is not None and same_but_ones(there.shape, row.stored(shape)):
        part = row
    problems += part_problems(tensors, part, "scales", codes.name, shape, dtypes)
    return QuantizedTensor(codes.name, shape, order, FP8(), Part(codes.name), part)
