"""Frozen weights that stay in the few bits in which a checkpoint has them: no value is quantised or rounded anew."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmoe.codecs import Fp8Blocks, Int8Rows, Packed, four_bit
from jaxmoe.config import QuantizationConfig
from jaxmoe.errors import UserError, listed
from jaxmoe.interop.loading import Parts, inside
from jaxmoe.interop.peft.today import Today
from jaxmoe.interop.quantization.arithmetic import FP8, MXFP4, CodeBook, LLMInt8
from jaxmoe.interop.quantization.folder import Files, QuantizedFolder, StoredOrder
from jaxmoe.interop.quantization.stored_form import QuantizedTensor
from jaxmoe.interop.quantizing import Form, forms_of, gather
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.source import Source

_log = logging.getLogger(__name__)

KEPT = "FP8, MXFP4, and bitsandbytes' nf4, fp4 and int8"


class Scheme(NamedTuple):
    """How codes and scales of a tensor are held, as in `Form`."""

    kind: str
    block: int
    dtype: str


def scheme_of(tensor: QuantizedTensor, binding: Binding) -> Scheme | None:
    """How a quantised tensor is held; None for one that has no such form.

    Blocks must lie along the inputs of our parameter: what `jaxmoe.codecs` has are rows of blocks.
    """
    arithmetic = tensor.arithmetic
    if isinstance(arithmetic, MXFP4):
        kind = "mxfp4"
    elif isinstance(arithmetic, CodeBook):
        kind = arithmetic.kind
    elif isinstance(arithmetic, FP8):
        kind = "fp8"
    elif isinstance(arithmetic, LLMInt8):
        kind = "int8"
    else:
        return None
    if tensor.zeros is not None or tensor.whole is not None or tensor.groups is not None:
        return None
    if StoredOrder(tensor, binding).axes[-1] != (binding.declared.dims[-1],):
        return None
    block = tensor.scales.run or tensor.scales.step[1]
    if kind != "fp8" and tensor.stored_shape[-1] % block:
        return None
    return Scheme(kind, block, tensor.dtype.name)


def kept_forms(source: Source, model: Today) -> dict[str, Form]:
    """What of a model its checkpoint has in few bits and is held so.

    Args:
        source: the model.
        model: the same in transformers.

    Raises:
        UserError: there is nothing.
    """
    quantized = source.quantized
    forms, others = {}, []
    for name, form in forms_of(source.spec.declared, model, QuantizationConfig()).items():
        parts = source.bindings.of_parameter[name]
        found = {scheme_of(quantized[one.source], one) if one.source in quantized else None for one in parts}
        scheme = next(iter(found))
        if len(found) == 1 and scheme is not None:
            kind, block, dtype = scheme
            forms[name] = dataclasses.replace(
                form, kind=kind, block=block, double=False, dtype=dtype, kept=True
            )
        else:
            others += [one.source for one in parts if one.source in quantized]
    told = f"{source.folder or 'model.config'}"
    if not forms:
        why = f"{listed(others, 3)} have none of these" if others else "nothing in it is quantised"
        raise UserError(
            f"model.quantization: found 'keep', but of {told} no weight of a layer can be kept in {KEPT} with blocks "
            f"along its inputs: {why}; expected nf4, fp4, int8 or null"
        )
    if others:
        _log.warning(
            "model.quantization keep: %d quantised tensors of %s cannot be kept as they are and are held in "
            "model.dtype, such as %s",
            *(len(others), told, others[0]),
        )
    return forms


def layer_schemes(source: Source, model: Today) -> dict[str, Mapping[int, Scheme | None]]:
    """Of each parameter that may be kept, how each of its layers' tensors are held, by their index of L."""
    quantized = source.quantized
    found: dict[str, Mapping[int, Scheme | None]] = {}
    for name in forms_of(source.spec.declared, model, QuantizationConfig()):
        of_layer: dict[int, Scheme | None] = {}
        for one in source.bindings.of_parameter[name]:
            if one.source in quantized:
                of_layer[one.index["L"]] = scheme_of(quantized[one.source], one)
        found[name] = of_layer
    return found


def load_kept(files: Files, form: Form, parts: Sequence[Binding], placements: Packed) -> Packed:
    """Read the codes and scales of one parameter.

    Args:
        files: of the checkpoint.
        form: of the parameter.
        parts: tensors of the checkpoint that together hold it.
        placements: shardings of the packed arrays.
    """
    assert isinstance(files, QuantizedFolder)  # no other has what is kept
    found, quantized = Parts(parts, form.stack), files
    return gather(form, lambda index: read_kept(quantized, form, found, index), placements)


def read_kept(files: QuantizedFolder, form: Form, parts: Parts, index: tuple[int, ...]) -> Packed:
    """The codes and scales at an index of the letters of `Form.stack`, as numpy's arrays."""
    fixed = dict(zip(form.stack, index, strict=True))
    *rows, width = form.shape
    codes = np.empty(form.shape, np.uint8)
    scales = np.empty((*rows, -(-width // form.block)), np.uint8 if form.kind == "mxfp4" else np.float32)
    for part in inside(form.declared, parts.at(index), fixed):
        binding = part.binding
        quantized = files.quantized[binding.source]
        blocks = list(part.box)
        blocks[binding.letters.index(form.declared.dims[-1])] = slice(0, width, form.block)
        of_part = files.read_packed(binding.source, binding.sizes, part.box, blocks)
        part.put(of_part[0], codes)
        factors = of_part[1] if form.kind == "mxfp4" else quantized.arithmetic.factors(of_part[1])
        part.put(factors.view(np.uint8) if form.kind == "mxfp4" else factors, scales)
    if form.kind == "fp8":
        return Fp8Blocks(codes, scales, form.block, form.dtype)
    if form.kind == "int8":
        return Int8Rows(codes.view(np.int8), scales[..., 0], form.dtype)
    return four_bit.from_codes(codes, scales, form.kind, form.block, form.dtype)
