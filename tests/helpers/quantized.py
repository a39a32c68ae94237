"""Tiny models in quantised folders, and what such folders hold."""

import functools
from pathlib import Path

import families
import jax
import ml_dtypes
import numpy as np

from helpers import packed, quantize, tiny
from helpers.quantize import BF16
from jaxmoe.interop.quantization.config import split_config
from jaxmoe.interop.quantization.folder import QuantizedFolder
from jaxmoe.interop.source import config_source
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.params import named

BLOCK = (8, 16)
E8M0 = ml_dtypes.float8_e8m0fnu
BFLOAT16 = ml_dtypes.bfloat16
QWEN = families.config_json("qwen3_moe", num_hidden_layers=2) | {"torch_dtype": "float32"}
GPT_OSS = {
    **families.config_json("gpt_oss"),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}
EXPERTS = "model.layers.1.mlp.experts"
MODELS = [("fp8", "experts"), ("fp8", "fused"), ("mxfp4", "fused")]


def is_matrix(name):
    """What FP8 checkpoints quantise: neither embeddings nor routers, norms and biases."""
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router", "bias", "sinks")
    return not any(part in name for part in kept)


def is_experts(name):
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


@functools.cache
def qwen_tensors(layout):
    return tiny.random_tensors(QWEN, "bfloat16", layout)


@functools.cache
def gpt_oss_tensors():
    random = np.random.default_rng(0)
    blueprint = config_source(GPT_OSS)
    return {
        name: (0.2 * random.standard_normal(binding.shape)).astype(BF16)
        for name, binding in blueprint.bindings.of_tensor.items()
    }


def made(method, layout="experts", scales=np.float32):
    """config.json, the stored tensors, and those that they stand for."""
    config, tensors, chosen = (
        (QWEN, qwen_tensors(layout), is_matrix)
        if method == "fp8"
        else (GPT_OSS, gpt_oss_tensors(), is_experts)
    )
    stored, plain, quantization = quantize.quantize(tensors, method, chosen, BLOCK, scales)
    return config | {"quantization_config": quantization}, stored, plain


def any_fp8(shape, block=BLOCK, dtype=np.float32, seed=0):
    """Every code, and scales from the smallest to the largest."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, shape, np.uint8).view(quantize.E4M3)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return codes, (random.uniform(0.5, 1, grid) * 2.0 ** random.integers(-120, 121, grid)).astype(dtype)


def any_mxfp4(experts, rows, columns, seed=0):
    random = np.random.default_rng(seed)
    scales = random.integers(0, 256, (experts, rows, columns // 32), np.uint8)
    scales.flat[:4] = 0, 1, 254, 255
    return random.integers(0, 256, (*scales.shape, 16), np.uint8), scales


def view_of(folder, method, tensors, block=BLOCK):
    """A quantised folder that needs no model."""
    tiny.write_tensors(folder, tensors)
    config = {"quant_method": method} | ({"weight_block_size": list(block)} if method == "fp8" else {})
    problems = []
    files = QuantizedFolder(
        CheckpointFolder(folder), split_config({"quantization_config": config}, "")[1], problems
    )
    assert not problems
    return files


def where(model, part):
    """The parameter of the experts of the last layer that has any."""
    return [name for name, _ in named(model.pure_params()) if name.endswith(f"experts.{part}")][-1]


def change(model, factor, part="gate_up", index=(-1, 3, 1, 5)):
    """Multiply some numbers of the experts, as training would."""
    leaf = functools.reduce(
        lambda tree, key: tree[int(key) if key.isdigit() else key],
        where(model, part).split("."),
        model.params,
    )
    values = np.array(leaf[...])
    with np.errstate(invalid="ignore"):
        values[index] = (values[index].astype(np.float32) * factor).astype(values.dtype)
    leaf[...] = jax.device_put(values, leaf[...].sharding)
    return values


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def tensors_of(folder):
    with CheckpointFolder(folder) as files:
        return {
            name: (i.dtype, i.shape, b"".join(files.iter_bytes(name))) for name, i in files.tensors.items()
        }


def described(tensors):
    names = {np.dtype(dtype): name for name, dtype in (("BF16", BF16), ("F32", np.float32), ("U8", np.uint8))}
    return {n: (names.get(t.dtype, "F8_E4M3"), t.shape, t.tobytes()) for n, t in tensors.items()}


def assert_equal_bits(actual, expected):
    """NaN may have any sign and payload."""
    assert actual.dtype == expected.dtype == BF16
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    actual, expected = (np.ascontiguousarray(array).view(np.uint16) for array in (actual, expected))
    np.testing.assert_array_equal(np.where(nan, 0, actual), np.where(nan, 0, expected))


PACKED = (
    QWEN
    | {"hidden_size": 96, "moe_intermediate_size": 64, "intermediate_size": 160}
    | {
        "head_dim": 8,
        "num_experts": 4,
    }
)
"""Widths that every format can have, and four experts."""


def folder_of(kind):
    """config.json, the stored tensors and those that they stand for, of a model in one of `packed.FORMATS`."""
    random, format = packed.random_of(kind), packed.FORMATS[kind]
    stored, plain = {}, {}
    for name, values in tiny.random_tensors(PACKED, "bfloat16").items():
        if not is_matrix(name):
            stored[name] = plain[name] = values
            continue
        parts, plain[name] = format.make(random, values.shape)
        stored |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in parts.items()}
    return PACKED | {"quantization_config": format.config}, stored, plain


def fused_bnb(nested, dtype="bfloat16"):
    """Experts as replace_parameter_4bit stores them, and linear layers in 4 bits."""
    random, stored, plain = np.random.default_rng(0), {}, {}
    for name, values in tiny.random_tensors(PACKED, "bfloat16", "fused").items():
        if is_matrix(name):
            made = packed.bnb4(
                random,
                values.shape,
                block=32,
                nested=nested,
                dtype=dtype,
                name=name,
                kind="fp4" if "q_proj" in name else "nf4",
            )
            stored |= made[0]
            plain[name] = made[1]
        else:
            stored[name] = plain[name] = values
    return PACKED | {"quantization_config": packed.bnb_config(4)}, stored, plain
