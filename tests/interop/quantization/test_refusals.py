"""Everything that is wrong with a quantised folder stands in one message."""

import numpy as np
import pytest
from helpers import quantize, tiny
from helpers.quantized import EXPERTS, QWEN, any_fp8, made

import jaxmoe
from jaxmoe import UserError
from jaxmoe.config import RunConfig
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.source import config_source, open_source


def refusal(folder, config, tensors):
    quantize.write(folder, config, tensors, 1)
    with pytest.raises(UserError) as caught:
        open_source(folder)
    return str(caught.value).removeprefix(f"{folder}: ")


def test_damaged_fp8(folders):
    config, stored, _ = made("fp8")
    stem = f"{EXPERTS}."
    del stored[stem + "0.up_proj.weight_scale_inv"]
    del stored[stem + "1.up_proj.weight"]
    stored[stem + "2.up_proj.weight_scale_inv"] = np.ones((4, 2), np.float32)
    stored[stem + "3.up_proj.weight_scale_inv"] = np.ones((4, 3), np.float16)
    stored[stem + "4.up_proj.weight"] = np.ones((28, 40), np.float32)
    stored["model.norm.weight"] = np.ones(40, quantize.E4M3)
    told = refusal(folders.source, config, stored).removeprefix("7 problems: ").split("; ")
    assert sorted(told) == sorted(
        [
            f"tensor {stem}0.up_proj.weight_scale_inv is missing, which has the scales of "
            f"{stem}0.up_proj.weight",
            f"tensor {stem}1.up_proj.weight_scale_inv has scales, but there is no {stem}1.up_proj.weight",
            f"tensor {stem}1.up_proj.weight is missing",
            f"tensor {stem}2.up_proj.weight_scale_inv has shape [4, 2], expected [4, 3]: the scales of "
            f"{stem}2.up_proj.weight",
            f"tensor {stem}3.up_proj.weight_scale_inv has dtype F16, expected one of F32, BF16, F8_E8M0",
            f"tensor {stem}4.up_proj.weight has dtype F32, expected F8_E4M3: "
            f"{stem}4.up_proj.weight_scale_inv has scales of it",
            "tensor model.norm.weight has shape [40], expected matrices to have scales of",
        ]
    )


def test_damaged_mxfp4(folders):
    config, stored, plain = made("mxfp4")
    first, second = "model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."
    del stored[first + "gate_up_proj_scales"]
    del stored[first + "down_proj_blocks"]
    stored[second + "gate_up_proj"] = plain[second + "gate_up_proj"]
    stored[second + "down_proj_scales"] = stored[second + "down_proj_scales"][:, :, :2].astype(np.float32)
    told = refusal(folders.source, config, stored).removeprefix("6 problems: ").split("; ")
    assert sorted(told) == sorted(
        [
            f"tensor {first}gate_up_proj_scales is missing, which has the scales of {first}gate_up_proj_blocks",
            f"tensor {first}down_proj_scales has scales, but there is no {first}down_proj_blocks",
            f"tensor {first}down_proj is missing",
            f"tensor {second}gate_up_proj is there twice, as it is and as {second}gate_up_proj_blocks: expected "
            "one of them",
            f"tensor {second}down_proj_scales has shape [4, 64, 2], expected [4, 64, 3]: the scales of "
            f"{second}down_proj_blocks",
            f"tensor {second}down_proj_scales has dtype F32, expected U8",
        ]
    )


@pytest.mark.parametrize(
    "blocks",
    [
        np.zeros((4, 64, 3, 15), np.uint8),
        np.zeros((4, 64, 16), np.uint8),
        np.zeros((4, 64, 3, 16), np.int8),
    ],
)
def test_blocks_of_another_kind(folders, blocks):
    config, stored, _ = made("mxfp4")
    stored[f"{EXPERTS}.down_proj_blocks"] = blocks
    told = refusal(folders.source, config, stored)
    assert (
        f"tensor {EXPERTS}.down_proj_blocks is {'I8' if blocks.dtype == np.int8 else 'U8'} [4, 64, " in told
    )
    assert "expected U8 of shape [experts, out, in / 32, 16]" in told


def test_shape_of_the_unquantised_tensor(folders):
    config, stored, _ = made("fp8")
    name = f"{EXPERTS}.4.down_proj.weight"
    stored[name], stored[name + "_scale_inv"] = any_fp8((40, 30))
    assert refusal(folders.source, config, stored) == (f"tensor {name} has shape [40, 30], expected [40, 28]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fp8", "quantization_config = 'fp8': expected an object with a quant_method"),
        ({}, r"quantization_config.quant_method = None is not supported; supported: fp8, mxfp4"),
        ({"quant_method": ["fp8"]}, r"quant_method = \['fp8'\] is not supported; supported: fp8, mxfp4"),
        (
            {"quant_method": "hqq", "load_in_4bit": True},
            "quant_method = 'hqq' is not supported; supported: fp8, mxfp4, .*bitsandbytes. Convert the",
        ),
        ({"quant_method": "mxfp4", "bits": 4}, "has unknown fields 'bits'; known are dequantize, mod"),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 8], "zz": 4},
            "has unknown fields 'zz'; known are act",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 0]},
            r"weight_block_size = \[8, 0\]: expected two",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8, True]},
            r"weight_block_size = \[8, True\]: expected",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8]},
            r"weight_block_size = \[8\]: expected two positive",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "none", "weight_block_size": [8, 8]},
            "quantization_config.activation_scheme = 'none' is not supported; expected 'dynamic' or 'static'",
        ),
        (
            {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [8, 8]},
            "quantization_config.fmt = 'e5m2' is not supported; expected 'e4m3' or 'float8_e4m3fn'",
        ),
    ],
)
def test_config(given, message):
    with pytest.raises(UserError, match=message):
        config_source(QWEN | {"quantization_config": given})


def test_run_of_random_weights_has_no_source():
    run = {
        "model": {"config": QWEN},
        "data": {"path": "text.txt", "sequence_length": 8},
        "optimizer": {"learning_rate": 0.1},
        "train": {"steps": 1, "batch_size": 1, "export_quantization": "source"},
        "output_dir": "run",
    }
    with pytest.raises(UserError, match="train.export_quantization: found 'source', but model.path names no"):
        RunConfig.from_mapping(run, "")


def test_config_of_nothing():
    assert config_source(QWEN | {"quantization_config": None}).spec == config_source(QWEN).spec


def test_unknown_form_of_export(folders):
    tiny.write_checkpoint(folders.source, "olmoe", "bfloat16", shards=1, num_hidden_layers=1)
    model = jaxmoe.from_pretrained(folders.source)
    with pytest.raises(UserError, match="quantization 'fp8': expected 'none' or 'source'"):
        jaxmoe.save_pretrained(model, folders.export, quantization="fp8")


def test_random_model_has_no_source(folders):
    model = from_config(QWEN)
    with pytest.raises(
        UserError,
        match="'source': the model was not loaded from a folder whose format it could have; expected 'none'",
    ):
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
