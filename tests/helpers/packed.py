"""Weights in formats that take several tensors for one, made by the formats' documentation alone: no code of jaxmoe's.

Each function makes a weight (out, in) of random codes and scales. It returns what a folder stores of it, by the endings
of the names, and the bfloat16 values that this stands for. `FORMATS` has them with a config by a short name.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from helpers.quantize import BF16, E4M3, FP4, FP8, spread, to_bf16

Made = tuple[dict[str, np.ndarray], np.ndarray]


def words(codes: np.ndarray, bits: int, places: list[int] | None = None, width: int = 32) -> np.ndarray:
    """Integers along the last axis → stored numbers of `width` bits, in which each takes one of the `places`."""
    count = width // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)]).astype(np.uint64)
    apart = codes.reshape(*codes.shape[:-1], -1, count)
    total = sum(apart[..., i] << np.uint64(bits * slot) for i, slot in enumerate(places or range(count)))
    return np.asarray(total).astype(f"u{width // 8}")


def scales_of(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return (0.02 * random.uniform(0.3, 1, shape)).astype(dtype)


def _exact(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Products in float64, rounded by way of float32, as which all of them are taken."""
    return to_bf16(codes * spread(scales.astype(np.float32), block, codes.shape))


def ct_integers(
    random: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 32,
    zeros: bool = False,
    shuffled: bool = False,
    dtype: Any = BF16,
) -> Made:
    """compressed-tensors, pack-quantized."""
    rows, columns = shape
    groups = -(-columns // group)
    codes = random.integers(0, 2**bits, shape)
    scales = scales_of(random, (rows, groups), dtype)
    stored = {
        "weight_packed": words(codes, bits).view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    offset = np.full((rows, groups), 2 ** (bits - 1))
    if zeros:
        offset = random.integers(0, 2**bits, offset.shape)
        stored["weight_zero_point"] = np.ascontiguousarray(words(offset.T, bits).T).view(np.int32)
    of = np.arange(columns) // group
    if shuffled:
        of = random.permutation(of)
        stored["weight_g_idx"] = of.astype(np.int32)
    return stored, to_bf16((codes - offset[:, of]) * scales.astype(np.float64)[:, of])


def eight_bits(
    random: np.random.Generator,
    shape: tuple[int, int],
    *,
    block: tuple[int, int] | None,
    integers: bool = False,
    dtype: Any = np.float32,
    scale: str = "weight_scale",
    scale_shape: Callable[[np.ndarray], np.ndarray] = lambda scales: scales,
    beside: Mapping[str, np.ndarray] = {},
) -> Made:
    """FP8 or int8 with one scale per block, by default of the whole tensor."""
    block = shape if block is None else (min(block[0], shape[0]), min(block[1], shape[1]))
    codes = random.integers(0, 256, shape, np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN has tests of its own
    scales = scales_of(random, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), dtype)
    values = codes.view(np.int8).astype(np.float64) if integers else FP8[codes]
    stored = {
        "weight": codes.view(np.int8 if integers else E4M3),
        scale: np.ascontiguousarray(scale_shape(scales)),
    }
    return stored | dict(beside), _exact(values, scales, block)


def nvfp4(
    random: np.random.Generator, shape: tuple[int, int], *, names: tuple[str, str, str], divides: bool
) -> Made:
    """16 numbers to a float8 scale, and one scale for all, a divisor or a factor."""
    codes = random.integers(0, 16, shape)
    scales = random.uniform(30, 448, (shape[0], shape[1] // 16)).astype(E4M3)
    whole = np.float32(random.uniform(1e-5, 4e-5))
    whole = np.float32(1 / whole) if divides else whole
    wide = FP8[scales.view(np.uint8)]
    factors = (wide / np.float64(whole) if divides else wide * np.float64(whole)).astype(np.float32)
    stored = {
        names[0]: words(codes, 4, width=8),
        names[1]: scales,
        names[2]: np.array([whole]) if divides else np.array(whole),
    }
    return stored, _exact(FP4[codes], factors, (1, 16))


def mxfp4(random: np.random.Generator, shape: tuple[int, int]) -> Made:
    """32 numbers to an exponent."""
    codes = random.integers(0, 16, shape)
    exponents = random.integers(115, 124, (shape[0], shape[1] // 32), np.uint8)
    stored = {"weight_packed": words(codes, 4, width=8), "weight_scale": exponents}
    return stored, _exact(FP4[codes], 2.0 ** (exponents.astype(np.float64) - 127), (1, 32))


def awq(random: np.random.Generator, shape: tuple[int, int], *, group: int = 32) -> Made:
    """AutoAWQ, gemm: transposed; column i of eight is where the order 0, 2, 4, 6, 1, 3, 5, 7 has i."""
    columns, rows = shape
    places = [[0, 2, 4, 6, 1, 3, 5, 7].index(i) for i in range(8)]
    codes = random.integers(0, 16, (rows, columns))
    zeros = random.integers(0, 16, (-(-rows // group), columns))
    scales = scales_of(random, zeros.shape, np.float16)
    of = np.arange(rows) // group
    stored = {
        "qweight": words(codes, 4, places).view(np.int32),
        "qzeros": words(zeros, 4, places).view(np.int32),
        "scales": scales,
    }
    return stored, _transposed((codes - zeros[of]) * scales.astype(np.float64)[of])


def gptq(
    random: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 32,
    less_one: bool = True,
    shuffled: bool = False,
) -> Made:
    """Transposed and packed along the rows; zero points less one in the first version."""
    columns, rows = shape
    codes = random.integers(0, 2**bits, (rows, columns))
    zeros = random.integers(int(less_one), 2**bits, (-(-rows // group), columns))
    scales = scales_of(random, zeros.shape, np.float16)
    of = np.arange(rows) // group
    of = random.permutation(of) if shuffled else of
    stored = {
        "qweight": np.ascontiguousarray(words(codes.T, bits).T).view(np.int32),
        "qzeros": words(zeros - int(less_one), bits).view(np.int32),
        "scales": scales,
        "g_idx": of.astype(np.int32),
    }
    return stored, _transposed((codes - zeros[of]) * scales.astype(np.float64)[of])


NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
BOOKS = {
    "nf4": np.array(NF4.split(), np.float32),
    "fp4": np.array([s * v / 192 for s in (1, -1) for v in (0, 1, 128, 192, 64, 96, 32, 48)], np.float32),
}


def bnb4(
    random: np.random.Generator,
    shape: tuple[int, ...],
    *,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = False,
    dtype: str = "bfloat16",
    storage: Any = np.uint8,
    name: str = "weight",
) -> Made:
    """bitsandbytes: elements in row-major order, two to a byte, the first in the high bits; blocks through rows."""
    size = int(np.prod(shape))
    codes = random.integers(0, 16, size)
    blocks = -(-size // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": shape}
    absmax = scales_of(random, (blocks,), np.float32)
    stored = {
        name: (codes[::2] * 16 + codes[1::2]).astype(np.uint8).view(storage)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": BOOKS[kind],
    }
    if nested:
        scale_codes = random.integers(0, 256, blocks, np.uint8)
        table = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
        each = scales_of(random, (-(-blocks // 256),), np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0302734375}
        absmax = table[scale_codes] * each[np.arange(blocks) // 256] + np.float32(0.0302734375)
        stored |= {
            f"{name}.absmax": scale_codes,
            f"{name}.nested_absmax": each,
            f"{name}.nested_quant_map": table,
        }
    said = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = BOOKS[kind][codes] * absmax[np.arange(size) // block]
    given = {"bfloat16": to_bf16, "float16": np.float16, "float32": np.float32}[dtype](values)
    return stored | {f"{name}.quant_state.bitsandbytes__{kind}": said}, given.reshape(shape)


def bnb8(random: np.random.Generator, shape: tuple[int, int]) -> Made:
    """bitsandbytes' LLM.int8."""
    codes = random.integers(-127, 128, shape, np.int8)
    scales = scales_of(random, shape[:1], np.float32)
    stored = {"weight": codes, "SCB": scales, "weight_format": np.array(0, np.uint8)}
    return stored, to_bf16(codes * scales[:, None] * np.float32(7.874015718698502e-3))


def _transposed(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(to_bf16(values).T)


def random_of(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


class Kind(NamedTuple):
    """One format: what makes a weight in it, and the quantization_config."""

    make: Callable[[np.random.Generator, tuple[int, int]], Made]
    config: dict[str, Any]


def ct_config(format: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    usual = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
    scheme = {"targets": ["Linear"], "weights": usual | weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": scheme | {"output_activations": None}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


def _gptq_config(**fields: Any) -> dict[str, Any]:
    usual = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    return usual | {"damp_percent": 0.01, "true_sequential": True, "lm_head": False} | fields


def _modelopt_config(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head", "model.layers.1.mlp.gate"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.33.0"},
    }


def bnb_config(bits: int, **fields: Any) -> dict[str, Any]:
    usual = {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }
    return usual | fields


_ACTIVATION = {"input_scale": np.array(0.5, np.float32)}
_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

FORMATS: Mapping[str, Kind] = {
    "fp8 per tensor": Kind(
        functools.partial(
            eight_bits, block=None, scale_shape=lambda scales: scales.reshape(()), beside=_ACTIVATION
        ),
        _FP8 | {"ignored_layers": ["lm_head"]},
    ),
    "fp8 per tensor, transformers": Kind(
        functools.partial(
            eight_bits,
            block=None,
            scale="weight_scale_inv",
            scale_shape=lambda scales: scales.reshape(1),
            beside={"activation_scale": np.ones((), np.float32)},
        ),
        _FP8 | {"weight_block_size": None},
    ),
    "fp8 per row": Kind(functools.partial(eight_bits, block=(1, 10**6)), {"quant_method": "fp8"}),
    "modelopt fp8": Kind(
        functools.partial(
            eight_bits, block=None, scale_shape=lambda scales: scales.reshape(()), beside=_ACTIVATION
        ),
        _modelopt_config("FP8"),
    ),
    "modelopt nvfp4": Kind(
        functools.partial(nvfp4, names=("weight", "weight_scale", "weight_scale_2"), divides=False),
        _modelopt_config("NVFP4"),
    ),
    "int4": Kind(ct_integers, ct_config("pack-quantized", **_INT4)),
    "int4 with zero points": Kind(
        functools.partial(ct_integers, zeros=True, dtype=np.float16),
        ct_config("pack-quantized", **_INT4 | {"symmetric": False}),
    ),
    "int4 in any order": Kind(
        functools.partial(ct_integers, shuffled=True),
        ct_config("pack-quantized", **_INT4 | {"actorder": "group"}),
    ),
    "int8 packed": Kind(
        functools.partial(ct_integers, bits=8, group=10**6),
        ct_config("pack-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "int8": Kind(
        functools.partial(eight_bits, block=(1, 10**6), integers=True, dtype=BF16),
        ct_config("int-quantized", {"num_bits": 8, "dynamic": True}, type="int", strategy="channel"),
    ),
    "float per row": Kind(
        functools.partial(eight_bits, block=(1, 10**6), dtype=BF16),
        ct_config("float-quantized", {"num_bits": 8, "dynamic": True}, strategy="channel"),
    ),
    "float per tensor": Kind(
        functools.partial(
            eight_bits, block=None, scale_shape=lambda scales: scales.reshape(1), beside=_ACTIVATION
        ),
        ct_config("naive-quantized", {"num_bits": 8, "dynamic": False}, strategy="tensor"),
    ),
    "float per block": Kind(
        functools.partial(eight_bits, block=(8, 16)),
        ct_config("float-quantized", strategy="block", block_structure="8x16"),
    ),
    "nvfp4": Kind(
        functools.partial(
            nvfp4, names=("weight_packed", "weight_scale", "weight_global_scale"), divides=True
        ),
        ct_config("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
    ),
    "mxfp4": Kind(mxfp4, ct_config("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)),
    "awq": Kind(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    ),
    "gptq": Kind(gptq, _gptq_config()),
    "gptq in any order": Kind(functools.partial(gptq, shuffled=True), _gptq_config(desc_act=True)),
    "gptq_v2": Kind(
        functools.partial(gptq, less_one=False), _gptq_config(checkpoint_format="gptq_v2", format="gptq_v2")
    ),
    "gptq of 8 bits": Kind(functools.partial(gptq, bits=8, group=10**6), _gptq_config(bits=8, group_size=-1)),
    "nf4": Kind(bnb4, bnb_config(4)),
    "nf4 in rows of blocks": Kind(functools.partial(bnb4, block=32), bnb_config(4)),
    "nf4 with double quantisation": Kind(
        functools.partial(bnb4, block=32, nested=True), bnb_config(4, bnb_4bit_use_double_quant=True)
    ),
    "fp4 in float32": Kind(
        functools.partial(bnb4, kind="fp4", storage=np.float32),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "float32"},
    ),
    "llm.int8": Kind(bnb8, bnb_config(8)),
}
