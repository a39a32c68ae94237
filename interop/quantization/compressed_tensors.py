"""The formats of the compressed-tensors library (llm-compressor, Kimi-K2-Thinking), as far as weights go.

Each group of the config has a scheme of weights. Which of them a weight has, and whether it has one, its tensors say:

- integers of 4 or 8 bits (``pack-quantized``): ``weight_packed`` (I32, out × ceil(in · bits / 32), the first number in
  the lowest bits and offset by half the range), ``weight_scale``, for schemes without symmetry ``weight_zero_point``
  packed along out, ``weight_g_idx`` where groups are not in order, and ``weight_shape``, which repeats the shape;
- FP8 (``float-quantized``, ``naive-quantized``): ``weight`` (F8_E4M3) and ``weight_scale``;
- int8 (``int-quantized``, ``naive-quantized``): ``weight`` (I8) and ``weight_scale``;
- NVFP4 (``nvfp4-pack-quantized``): ``weight_packed`` (U8, two numbers to a byte, the low bits first), ``weight_scale``
  (F8_E4M3, one per 16 along a row) and ``weight_global_scale``, which divides;
- MXFP4 (``mxfp4-pack-quantized``): ``weight_packed`` the same, and ``weight_scale`` (U8, exponents, one per 32).

Scales are one for all of a tensor, or per row, per group along a row or per block. Those of activations and of the
key-value cache change nothing in bfloat16.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.arithmetic import FP8, MXFP4, Integers
from jaxmoe.interop.quantization.nvfp4 import COLUMNS_PER_SCALE, SCALES, WHOLE, nvfp4_tensor
from jaxmoe.interop.quantization.stored_form import (
    COLUMNS,
    ROWS,
    Part,
    QuantizedTensor,
    check_fields,
    found_parts,
    is_size,
    packed,
    part_problems,
    there_twice,
)
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
_FLOATS: tuple[str, ...] = ("F32", "BF16", "F16")
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "format": _FORMATS,
    "quantization_status": ("compressed", "frozen", None),
    "transform_config": ({}, None),
    "moe_sparsity_config": (None,),
}
_KNOWN = frozenset(
    {
        "quant_method",
        "config_groups",
        "ignore",
        "kv_cache_scheme",
        "global_compression_ratio",
        "version",
        "sparsity_config",
    }
)
_SCHEME_CHOICES: Mapping[str, tuple[Any, ...]] = {"format": (*_FORMATS, None), "output_activations": (None,)}
_SCHEME_KNOWN = frozenset({"targets", "weights", "input_activations"})
_WEIGHTS_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "type": ("int", "float", None),
    "num_bits": (4, 8, None),
    "symmetric": (True, False, None),
    "strategy": ("tensor", "channel", "group", "block", "tensor_group", None),
    "dynamic": (False, None),
    "actorder": ("group", "weight", "static", "dynamic", True, False, None),
}
_WEIGHTS_KNOWN = frozenset(
    {"group_size", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
)
_INERT = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_ENDINGS = (
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_shape",
    ".weight_global_scale",
)


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """How weights are quantised, of one group of the config.

    Attributes:
        kind: "int" or "float".
        bits: of a code.
        block: rows and columns that share a scale; None for all of them.
        symmetric: there are no zero points.
    """

    kind: str
    bits: int
    block: tuple[int | None, int | None]
    symmetric: bool

    @classmethod
    def from_config(cls, given: Any, where: str) -> Self:
        """From ``weights`` of a group of the config.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        if not isinstance(given, dict):
            raise UserError(f"{where} = {quote(given)}: expected an object with num_bits, type and strategy")
        check_fields(given, where, _WEIGHTS_KNOWN, _WEIGHTS_CHOICES)
        kind, bits, size = given.get("type") or "int", given.get("num_bits") or 8, given.get("group_size")
        if size not in (None, -1) and not is_size(size):
            raise UserError(f"{where}.group_size = {quote(size)}: expected a positive integer, -1 or null")
        strategy = given.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
        block = given.get("block_structure")
        if isinstance(block, str) and re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", block):
            block = [int(size) for size in block.split("x")]
        if strategy in ("group", "tensor_group"):
            if not is_size(size):
                raise UserError(f"{where}.group_size = {quote(size)}: strategy {strategy!r} needs one")
            shared: tuple[int | None, int | None] = (1, size)
        elif strategy == "block":
            if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
                raise UserError(
                    f"{where}.block_structure = {quote(block)}: expected two positive integers, rows and columns of "
                    "a block"
                )
            shared = (block[0], block[1])
        else:
            shared = (1, None) if strategy == "channel" else (None, None)
        symmetric = given.get("symmetric") is not False
        if not symmetric and (kind, bits) != ("int", 4):
            raise UserError(f"{where}.symmetric = False is supported for integers of 4 bits only")
        if (kind, bits) == ("float", 4) and size not in (16, 32):
            raise UserError(f"{where}.group_size = {quote(size)}: expected 16 (NVFP4) or 32 (MXFP4)")
        return cls(kind, bits, shared, symmetric)

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        """The scales of that name of a tensor (…, rows, columns)."""
        rows, columns = self.block
        return Part(name, (rows or shape[-2], columns or shape[-1]))


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The formats of one folder.

    Attributes:
        schemes: of weights, the different ones.
    """

    schemes: tuple[_Scheme, ...]

    expected = "X.weight_packed or F8_E4M3 or I8 X.weight, with X.weight_scale"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        check_fields(given, where, _KNOWN, _CHOICES)
        sparse = given.get("sparsity_config") or {}
        if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
            raise UserError(
                f"{where}.sparsity_config = {quote(sparse)} is not supported; expected format 'dense'"
            )
        groups = given.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise UserError(f"{where}.config_groups = {quote(groups)}: expected an object of schemes")
        schemes = []
        for name, group in groups.items():
            inside = f"{where}.config_groups.{name}"
            if not isinstance(group, dict):
                raise UserError(f"{inside} = {quote(group)}: expected an object with targets and weights")
            check_fields(group, inside, _SCHEME_KNOWN, _SCHEME_CHOICES)
            if group.get("weights") is not None:
                schemes.append(_Scheme.from_config(group["weights"], f"{inside}.weights"))
        if not schemes:
            raise UserError(f"{where}.config_groups has no scheme of weights, expected one")
        return cls(tuple(dict.fromkeys(schemes)))

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        tensors = stored.tensors
        found: list[QuantizedTensor] = []
        hidden = {name for name in tensors if name.endswith(_INERT)}
        for name, info in tensors.items():
            kinds = _kinds(info)
            if kinds is None:
                continue
            hidden.add(name)
            stem = name.removesuffix("_packed")
            schemes = [one for one in self.schemes if (one.kind, one.bits) in kinds]
            if not schemes or len(info.shape) < 2 or 0 in info.shape:
                problems.append(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, which is no weight of any scheme in the config"
                )
            elif name != stem and stem in tensors:
                problems.append(there_twice(stem, name))
            else:
                tried = [_described(tensors, info, stem, scheme) for scheme in schemes]
                tensor, wrong = next((one for one in tried if not one[1]), tried[0])
                found.append(tensor)
                problems += wrong
                hidden |= tensor.names
        return found, found_parts(tensors, hidden, _ENDINGS, problems)


def _kinds(info: TensorInfo) -> tuple[tuple[str, int], ...] | None:
    """Kinds and bits of numbers that a tensor may have as codes; None for one that has none."""
    if info.name.endswith(".weight_packed"):
        return {"I32": (("int", 4), ("int", 8)), "U8": (("float", 4),)}.get(info.dtype, ())
    if info.name.endswith(".weight"):
        return {"F8_E4M3": (("float", 8),), "I8": (("int", 8),)}.get(info.dtype)
    return None


def _described(
    tensors: Mapping[str, TensorInfo], codes: TensorInfo, name: str, scheme: _Scheme
) -> tuple[QuantizedTensor, list[str]]:
    """The weight of that name as a scheme has it, and what is wrong with it."""
    scales, dtypes = f"{name}_scale", _FLOATS
    order = tuple(range(len(codes.shape)))
    if codes.name == name:
        arithmetic = FP8() if scheme.kind == "float" else Integers(8, signed=True)
        part = scheme.part(scales, codes.shape)
        tensor = QuantizedTensor(name, codes.shape, order, arithmetic, Part(name), part)
    elif scheme.kind == "int":
        tensor = _integers(tensors, codes, name, scheme)
    elif scheme.block == (1, COLUMNS_PER_SCALE):
        tensor, dtypes = nvfp4_tensor(name, codes, scales, f"{name}_global_scale", divides=True), SCALES
    else:
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        part = Part(codes.name, packing=packed(8, 4, COLUMNS))
        tensor = QuantizedTensor(name, shape, order, MXFP4(), part, scheme.part(scales, shape))
        dtypes = ("U8", "F8_E8M0")
    return tensor, list(_problems(tensors, tensor, dtypes))


def _integers(
    tensors: Mapping[str, TensorInfo], codes: TensorInfo, name: str, scheme: _Scheme
) -> QuantizedTensor:
    """A weight of packed integers. How many columns the last word has is known from the groups, if there are any."""
    count = 32 // scheme.bits
    columns, group = codes.shape[-1] * count, scheme.block[1]
    there = tensors.get(f"{name}_scale")
    if group is not None and there is not None and there.shape:
        exact = there.shape[-1] * group
        columns = exact if 0 <= columns - exact < count else columns
    shape = (*codes.shape[:-1], columns)
    scales = scheme.part(f"{name}_scale", shape)
    zeros = Part(f"{name}_zero_point", scales.step, packed(32, scheme.bits, ROWS))
    return QuantizedTensor(
        name,
        shape,
        tuple(range(len(shape))),
        Integers(scheme.bits, zeros=not scheme.symmetric, symmetric=scheme.symmetric),
        Part(codes.name, packing=packed(32, scheme.bits, COLUMNS)),
        scales,
        zeros=None if scheme.symmetric else zeros,
        groups=f"{name}_g_idx" if f"{name}_g_idx" in tensors else None,
        declared=f"{name}_shape",
    )


def _problems(
    tensors: Mapping[str, TensorInfo], tensor: QuantizedTensor, dtypes: tuple[str, ...]
) -> Iterator[str]:
    """What is wrong with the tensors beside the codes."""
    of, shape = tensor.codes.tensor, tensor.stored_shape
    yield from part_problems(tensors, tensor.scales, "scales", of, shape, dtypes)
    if tensor.zeros is not None:
        yield from part_problems(tensors, tensor.zeros, "zero points", of, shape, ("I32",))
    if tensor.whole is not None:
        yield from part_problems(tensors, tensor.whole.part, "scale of all", of, shape, WHOLE)
    if tensor.groups is not None:
        yield from part_problems(tensors, Part(tensor.groups), "groups", of, shape[-1:], ("I32", "I64"))
    if tensor.declared is not None:
        yield from part_problems(tensors, Part(tensor.declared), "shape", of, (len(shape),), ("I32", "I64"))
