"""Quantised checkpoints, made by the formats' definitions alone: tables of values, float64, no code of jaxmoe's.

`quantize` takes tensors and a rule which of them to quantise. It returns what a folder would store, and the bfloat16
values that this stands for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from helpers import tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def _small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    mantissa, exponent = code % 2**mantissa_bits, code >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    if not exponent:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


FP8 = np.array([np.nan if code & 127 == 127 else _small_float(code, 4, 3, 7) for code in range(256)])
FP4 = np.array([_small_float(code, 2, 1, 1) for code in range(16)])


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Float32 → bfloat16, to nearest even, by its bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).view(BF16)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The codes of the nearest finite values of a table, even codes where two are as near."""
    half = table[: len(table) // 2]
    half = half[np.isfinite(half)]
    middles = (half[1:] + half[:-1]) / 2
    size = np.abs(values).astype(np.float64)
    codes = np.searchsorted(middles, size, side="left")
    tied = (codes < len(middles)) & (middles[np.minimum(codes, len(middles) - 1)] == size)
    codes += tied & (codes % 2 == 1)
    return (codes + np.signbit(values) * (len(table) // 2)).astype(np.uint8)


def blocks_of(values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(..., R, C) → (..., R/r, C/c, r, c), the edges filled up with zeros."""
    *lead, rows, columns = values.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padding = [(0, 0)] * len(lead) + [(0, down * block[0] - rows), (0, across * block[1] - columns)]
    padded = np.pad(values.astype(np.float64), padding)
    return padded.reshape(*lead, down, block[0], across, block[1]).swapaxes(-3, -2)


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Each scale for all elements of its block."""
    return np.kron(scales.astype(np.float64), np.ones(block))[..., : shape[-2], : shape[-1]]


def quantize_fp8(values: np.ndarray, block: tuple[int, int], dtype: Any = np.float32) -> tuple[Any, Any]:
    """Codes and scales of (..., out, in)."""
    largest = np.abs(blocks_of(values, block)).max((-2, -1))
    scales = np.where(largest > 0, largest / 448, 1)
    if np.dtype(dtype).itemsize == 1:
        scales = 2.0 ** np.ceil(np.log2(scales))
    scales = scales.astype(dtype)
    codes = nearest(values.astype(np.float64) / spread(scales, block, values.shape), FP8)
    return codes.view(E4M3), scales


def dequantize_fp8(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """What codes and scales stand for."""
    with np.errstate(over="ignore", invalid="ignore"):
        return to_bf16(FP8[codes.view(np.uint8)] * spread(scales, block, codes.shape))


def quantize_mxfp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of (experts, in, out)."""
    rows = values.astype(np.float64).swapaxes(1, 2)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    largest = np.abs(groups).max(-1)
    with np.errstate(divide="ignore"):
        exponents = np.where(largest > 0, np.ceil(np.log2(largest / 6)), -127).clip(-127, 127)
    codes = nearest(groups / 2.0 ** exponents[..., None], FP4)
    # The safetensors library writes memory as it lies, and here that would be transposed.
    blocks = np.ascontiguousarray(codes[..., 0::2] + 16 * codes[..., 1::2])
    return blocks, np.ascontiguousarray((exponents + 127).astype(np.uint8))


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What blocks and scales stand for, (experts, in, out)."""
    values = np.stack([FP4[blocks % 16], FP4[blocks // 16]], -1).reshape(*scales.shape, 32)
    factors = 2.0 ** (scales.astype(np.float64) - 127)
    with np.errstate(over="ignore"):
        rows = to_bf16(values * factors[..., None]).reshape(*scales.shape[:2], -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2))


def quantize(
    tensors: Mapping[str, np.ndarray],
    method: str,
    chosen: Callable[[str], bool],
    block: tuple[int, int] = (8, 16),
    scales: Any = np.float32,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Quantise the tensors whose names are `chosen`.

    Args:
        tensors: by name.
        method: "fp8" or "mxfp4".
        chosen: says of a name whether to quantise the tensor.
        block: of fp8.
        scales: dtype of fp8's scales.

    Returns:
        What the folder stores, the unquantised bfloat16 folder that this stands for, and the quantization_config.
    """
    stored, plain = {}, {}
    for name, values in tensors.items():
        if not chosen(name):
            stored[name] = plain[name] = values
        elif method == "fp8":
            stored[name], stored[name + "_scale_inv"] = quantize_fp8(values, block, scales)
            plain[name] = dequantize_fp8(stored[name], stored[name + "_scale_inv"], block)
        else:
            stored[name + "_blocks"], stored[name + "_scales"] = quantize_mxfp4(values)
            plain[name] = dequantize_mxfp4(stored[name + "_blocks"], stored[name + "_scales"])
    fp8 = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [*block],
    }
    config = fp8 if method == "fp8" else {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return stored, plain, config


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 3
) -> None:
    """Write a folder with a tokenizer, in which neighbouring tensors lie in different files."""
    tiny.write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tiny.write_tokenizer(folder, config["vocab_size"])
