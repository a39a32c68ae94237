"""bitsandbytes' 4 bits (nf4 and fp4, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339), as transformers stores them.

4 bits: ``X`` (U8, n / 2 × 1, the first of two numbers in the high bits, or the same bytes in another dtype),
``X.absmax`` (F32, one for each block of elements in row-major order, through the ends of rows), ``X.quant_map``, which
repeats the values of the codes, and ``X.quant_state.bitsandbytes__nf4`` or ``…fp4`` (U8), a JSON object with the shape,
the dtype and the size of blocks. With double quantisation ``X.absmax`` is U8: a scale is the value of its code in
``X.nested_quant_map`` times that of ``X.nested_absmax`` for its block, plus the offset in the JSON object. ``X`` is a
weight, also of an expert alone (unsloth), or experts in one tensor of three axes (``replace_parameter_4bit``, axolotl).

int8: ``X.weight`` (I8, out × in), ``X.SCB`` (F32, out) and ``X.weight_format``: a number is code · SCB · (1 / 127).

Codes and scales are multiplied in float32 and rounded once, to the dtype in the JSON object, of int8 to bfloat16.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxmoe.codecs import int8_rows, tables
from jaxmoe.codecs.four_bit import BLOCKS
from jaxmoe.errors import quote
from jaxmoe.interop.quantization.arithmetic import CodeBook, LLMInt8
from jaxmoe.interop.quantization.stored_form import (
    COLUMNS,
    Nested,
    Packing,
    Part,
    QuantizedTensor,
    check_fields,
    found_parts,
    is_size,
    part_problems,
)
from jaxmoe.interop.storage.format import DTYPES, TensorInfo, loads_strict
from jaxmoe.interop.storage.reader import CheckpointFolder

_STATE = ".quant_state.bitsandbytes__"
_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_FLAG = (True, False, None)
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "load_in_4bit": _FLAG,
    "load_in_8bit": _FLAG,
    "_load_in_4bit": _FLAG,
    "_load_in_8bit": _FLAG,
    "bnb_4bit_quant_type": (*tables.VALUES, None),
    "bnb_4bit_use_double_quant": _FLAG,
    "llm_int8_has_fp16_weight": (False, None),
}
# Which tensors are quantised and how, they say themselves; the others are about computing with them.
_KNOWN = frozenset(
    {
        "quant_method",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
    }
)
_DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_STORAGE = ("U8", "I8", "BF16", "F16", "F32", "F64")
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_MOST_BYTES = 4096
_MOST_VALUES = 64
_ROWS_FORMAT = 0


class BitsAndBytes:
    """The formats; which of them a tensor has, the tensors beside it say."""

    expected = f"weights X with X{_STATE}nf4, or I8 X.weight with X.SCB"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        check_fields(given, where, _KNOWN, _CHOICES)
        return cls()

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`. Reads the states of all tensors, some hundred bytes each."""
        tensors = stored.tensors
        found: list[QuantizedTensor] = []
        hidden: set[str] = set()
        for name, info in tensors.items():
            stem, marked, kind = name.partition(_STATE)
            tensor = None
            if marked:
                hidden |= {name, stem, *(stem + ending for ending in _ENDINGS)}
                tensor = _four_bit(stored, info, stem, kind, problems)
            elif info.dtype == "I8" and name.endswith(".weight") and not _has_state(tensors, name):
                module = name.removesuffix(".weight")
                hidden |= {name, f"{module}.SCB", f"{module}.weight_format"}
                tensor = _int8(stored, info, module, problems)
            if tensor is not None:
                found.append(tensor)
                hidden |= tensor.names
        return found, found_parts(tensors, hidden, _ENDINGS, problems)


def _has_state(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    return any(f"{name}{_STATE}{kind}" in tensors for kind in tables.VALUES)


def _int8(
    stored: CheckpointFolder, codes: TensorInfo, module: str, problems: list[str]
) -> QuantizedTensor | None:
    """A weight in int8; what is wrong with it is appended to `problems`."""
    shape, scales = codes.shape, f"{module}.SCB"
    if len(shape) != 2 or 0 in shape:
        problems.append(f"tensor {codes.name} has shape {list(shape)}, expected a matrix of int8")
        return None
    tensor = QuantizedTensor(
        codes.name,
        shape,
        (0, 1),
        LLMInt8(),
        Part(codes.name),
        Part(scales, (1, shape[1])),
        unit=int8_rows.UNIT,
    )
    problems += part_problems(stored.tensors, tensor.scales, "scales", codes.name, shape, ("F32",))
    form = stored.tensors.get(f"{module}.weight_format")
    if form is not None and (form.dtype, math.prod(form.shape)) != ("U8", 1):
        problems.append(f"tensor {form.name} is {form.dtype} {list(form.shape)}, expected one U8")
    elif form is not None and (value := int(stored.read(form.name).reshape(()))) != _ROWS_FORMAT:
        problems.append(
            f"tensor {form.name} is {value}, expected {_ROWS_FORMAT}, for rows; save the model with a newer version"
        )
    return tensor


def _four_bit(
    stored: CheckpointFolder, state: TensorInfo, name: str, kind: str, problems: list[str]
) -> QuantizedTensor | None:
    """The weight of that name in 4 bits; what is wrong with it is appended to `problems`."""
    if kind not in tables.VALUES:
        problems.append(
            f"tensor {state.name} says quant_type {kind!r}, expected {' or '.join(map(repr, tables.VALUES))}; convert "
            "the checkpoint to bfloat16"
        )
        return None
    codes = stored.tensors.get(name)
    if codes is None:
        problems.append(f"tensor {state.name} says how {name} is quantised, but there is no {name}")
        return None
    try:
        given = _read_state(stored, state)
        wrong = _state_problem(given, kind)
    except ValueError as error:
        given, wrong = {}, f"cannot be read: {error}"
    if wrong is not None:
        problems.append(
            f"tensor {state.name} {wrong}; download it again, or convert the checkpoint to bfloat16"
        )
        return None
    shape = tuple(given["shape"])
    per_number = 2 * DTYPES[codes.dtype].bits // 8
    if codes.dtype not in _STORAGE or shape[-1] % per_number or 2 * codes.nbytes != math.prod(shape):
        problems.append(
            f"tensor {name} is {codes.dtype} {list(codes.shape)}, expected {math.prod(shape) // 2} bytes in one of "
            f"{', '.join(_STORAGE)}, rows of whole numbers: {state.name} says shape {list(shape)}"
        )
        return None
    tensor = _described(codes, kind, given)
    problems += _problems(stored.tensors, tensor)
    return tensor


def _read_state(stored: CheckpointFolder, state: TensorInfo) -> dict[str, Any]:
    """The JSON object of a tensor; ValueError for anything else."""
    if state.dtype != "U8" or state.nbytes > _MOST_BYTES:
        raise ValueError(
            f"it is {state.dtype} of {state.nbytes:,} bytes, expected U8 of at most {_MOST_BYTES:,}"
        )
    given = loads_strict(stored.read(state.name).tobytes(), _MOST_VALUES)
    if not isinstance(given, dict):
        raise ValueError(f"it holds {quote(given)}, expected an object")
    return given


def _state_problem(given: Mapping[str, Any], kind: str) -> str | None:
    """What is wrong with a tensor's JSON object."""
    is_nested = any(field in given for field in _NESTED_FIELDS)
    expected = _FIELDS + (_NESTED_FIELDS if is_nested else ())
    if given.keys() != set(expected):
        return f"has fields {', '.join(sorted(given))}, expected {', '.join(expected)}"
    shape = given["shape"]
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(map(is_size, shape)):
        return f"says shape {quote(shape)}, expected two or three positive integers"
    choices: dict[str, tuple[Any, ...]] = {
        "quant_type": (kind,),
        "blocksize": BLOCKS,
        "dtype": tuple(_DTYPES),
    }
    if is_nested:
        choices |= {"nested_dtype": ("float32",)}
        if not is_size(given["nested_blocksize"]):
            return f"says nested_blocksize {quote(given['nested_blocksize'])}, expected a positive integer"
        offset = given["nested_offset"]
        if not isinstance(offset, float | int) or isinstance(offset, bool) or not abs(offset) < math.inf:
            return f"says nested_offset {quote(offset)}, expected a finite number"
    for field, allowed in choices.items():
        if not any(given[field] == one and type(given[field]) is type(one) for one in allowed):
            return f"says {field} {quote(given[field])}, expected {' or '.join(map(repr, allowed))}"
    return None


def _described(codes: TensorInfo, kind: str, given: Mapping[str, Any]) -> QuantizedTensor:
    """A tensor as its JSON object has it. Scales that are in rows of blocks can be written anew, others cannot."""
    name, shape, block = codes.name, tuple(given["shape"]), given["blocksize"]
    nested = None
    if "nested_offset" in given:
        each = Part(f"{name}.nested_absmax", run=block * given["nested_blocksize"])
        nested = Nested(each, f"{name}.nested_quant_map", np.float32(given["nested_offset"]))
    whole_rows = nested is None and shape[-1] % block == 0
    absmax = f"{name}.absmax"
    return QuantizedTensor(
        name,
        shape,
        tuple(range(len(shape))),
        CodeBook(kind),
        Part(name, packing=_packing(DTYPES[codes.dtype].bits), flat=True),
        Part(absmax, (1, block), flat=True) if whole_rows else Part(absmax, run=block),
        nested=nested,
        table=f"{name}.quant_map",
        dtype=_DTYPES[given["dtype"]],
    )


def _packing(bits: int) -> Packing:
    """Two numbers in each byte, the first in the high bits, in little-endian numbers of so many bits."""
    return Packing(tuple(byte + half for byte in range(0, bits, 8) for half in (4, 0)), 4, COLUMNS)


def _problems(tensors: Mapping[str, TensorInfo], tensor: QuantizedTensor) -> list[str]:
    """What is wrong with the tensors beside the codes."""
    name, shape, nested = tensor.name, tensor.shape, tensor.nested
    dtype = "F32" if nested is None else "U8"
    problems = list(part_problems(tensors, tensor.scales, "scales", name, shape, (dtype,)))
    sizes = {tensor.table: len(tensor.arithmetic.values)}
    if nested is not None:
        problems += part_problems(tensors, nested.part, "scales of scales", name, shape, ("F32",))
        sizes[nested.table] = len(tables.DYNAMIC)
    for table, size in sizes.items():
        if table is not None:
            problems += part_problems(tensors, Part(table), "values of codes", name, (size,), ("F32",))
    return problems
