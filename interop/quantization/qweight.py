"""What AWQ and GPTQ have in common: a weight X.weight (out × in) stored transposed, as integers with zero points.

``X.qweight`` has the integers (in × out) packed into int32, ``X.scales`` one float for each group of rows (in / group ×
out), ``X.qzeros`` the zero points packed along out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.stored_form import (
    Part,
    QuantizedTensor,
    check_fields,
    is_size,
    part_problems,
    there_twice,
)
from jaxmoe.interop.storage.format import TensorInfo

_CODES = ".qweight"
_OTHERS = (".qzeros", ".scales", ".g_idx")
_FLOATS = ("F16", "BF16", "F32")
_FIELDS = """
    quant_method method group_size modules_to_not_convert dynamic meta backend
    desc_act sym static_groups act_group_aware hyb_act mse damp_percent damp_auto_increment true_sequential
    dataset tokenizer batch_size model_seqlen pad_token_id max_input_length cache_block_outputs
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
    model_name_or_path model_file_base_name
    autoround_version iters nsamples seqlen lr minmax_lr enable_minmax_tuning enable_quanted_input low_gpu_mem_usage
    gradient_accumulate_steps amp data_type packing_format
    exllama_config use_exllama disable_exllama use_cuda_fp16 do_fuse modules_to_fuse fuse_max_seq_len
"""
_INERT = frozenset(_FIELDS.split())
"""Fields of a config that change nothing: how weights were quantised, and which kernels are to run them."""


def group_size(given: Mapping[str, Any], where: str) -> int | None:
    """Rows that share a scale, None for all, from a ``quantization_config``.

    Raises:
        UserError: it is neither a positive integer nor -1.
    """
    size = given.get("group_size")
    if size != -1 and not is_size(size):
        raise UserError(
            f"{where}.group_size = {quote(size)}: expected a positive integer, or -1 for whole columns"
        )
    return None if size == -1 else size


def check_config(given: Mapping[str, Any], where: str, choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse unknown fields of a config, other values than `choices`, and exceptions for single modules.

    But for those that GPTQModel does not quantise, which their tensors say as well.

    Raises:
        UserError: there is one.
    """
    check_fields(given, where, _INERT, choices)
    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(name.startswith("-:") for name in dynamic):
        raise UserError(
            f"{where}.dynamic = {quote(dynamic)} is not supported; expected modules to leave out, '-:' before each"
        )


def find_qweights(
    tensors: Mapping[str, TensorInfo],
    problems: list[str],
    describe: Callable[[TensorInfo, str], QuantizedTensor],
) -> tuple[list[QuantizedTensor], frozenset[str]]:
    """See `Format.find`.

    Args:
        tensors: of the folder.
        problems: what is damaged is appended.
        describe: a weight from its codes and its name without an ending.
    """
    found: list[QuantizedTensor] = []
    hidden = {name for name in tensors if name.endswith((_CODES, *_OTHERS))}
    used: set[str] = set()
    for name, info in tensors.items():
        if not name.endswith(_CODES):
            continue
        used.add(name)
        stem = name.removesuffix(_CODES)
        if f"{stem}.weight" in tensors:
            problems.append(there_twice(f"{stem}.weight", name))
        elif info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
            problems.append(f"tensor {name} is {info.dtype} {list(info.shape)}, expected an I32 matrix")
        else:
            tensor = describe(info, stem)
            found.append(tensor)
            used |= tensor.names
            problems += _problems(tensors, tensor)
    problems += [f"tensor {name} goes with no {_CODES}" for name in sorted(hidden - used)]
    return found, frozenset(hidden)


def _problems(tensors: Mapping[str, TensorInfo], tensor: QuantizedTensor) -> list[str]:
    of, shape = tensor.codes.tensor, tensor.stored_shape
    problems = list(part_problems(tensors, tensor.codes, "integers", tensor.name, shape, ("I32",)))
    problems += part_problems(tensors, tensor.scales, "scales", of, shape, _FLOATS)
    if tensor.zeros is not None:
        problems += part_problems(tensors, tensor.zeros, "zero points", of, shape, ("I32",))
    if tensor.groups is not None:
        problems += part_problems(tensors, Part(tensor.groups), "groups", of, shape[:1], ("I32", "I64"))
    return problems
