"""Bit for bit what transformers makes of the same tensors, and of the folders that are exported."""

import numpy as np
import pytest
from helpers import quantize, tiny
from helpers.quantize import BF16
from helpers.quantized import (
    BLOCK,
    any_fp8,
    any_mxfp4,
    assert_equal_bits,
    change,
    is_matrix,
    made,
    view_of,
    where,
)

import jaxmoe
from jaxmoe.interop.quantization.config import split_config
from jaxmoe.interop.quantization.folder import QuantizedFolder
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.params import named


@pytest.mark.torch
def test_fp8(tmp_path):
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for dtype in (torch.float32, torch.bfloat16):
        codes, scales = any_fp8((24, 48))
        theirs = torch.from_numpy(scales).to(dtype)
        scales = theirs.float().numpy().astype(BF16 if dtype == torch.bfloat16 else np.float32)
        files = view_of(tmp_path, "fp8", {"a": codes, "a_scale_inv": scales})
        expected = Fp8Dequantize(None)._dequantize_one(
            torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), theirs, torch.bfloat16
        )
        actual = files.read_box("a", (24, 48), [slice(None)] * 2)
        assert_equal_bits(actual, expected.view(torch.uint16).numpy().view(BF16))


@pytest.mark.torch
@pytest.mark.parametrize("block", [(24, 48), (1, 48)], ids=["per tensor", "per row"])
def test_fp8_without_blocks(tmp_path, block):
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = any_fp8((24, 48), block)
    tiny.write_tensors(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales})
    format = split_config({"quantization_config": {"quant_method": "fp8"}}, "")[1]
    files = QuantizedFolder(CheckpointFolder(tmp_path), format, [])
    expected = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scales),
        torch.bfloat16,
    )
    actual = files.read_box("a.weight", (24, 48), [slice(None)] * 2)
    assert_equal_bits(actual, expected.view(torch.uint16).numpy().view(BF16))


@pytest.mark.torch
def test_mxfp4(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = any_mxfp4(3, 70, 160)
    files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    actual = files.read_box("a", (3, 160, 70), [slice(None)] * 3)
    assert_equal_bits(actual, expected.view(torch.uint16).numpy().view(BF16))


@pytest.mark.torch
@pytest.mark.parametrize("quantization", ["none", "source"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_trained_folder_loads_there(folders, method, quantization):
    """Both forms of an export have the values that we read from it."""
    import torch
    from transformers import AutoModelForCausalLM

    config, stored, _ = made(method)
    if method == "fp8":  # they cannot read blocks that are cut off at an edge
        config |= {"moe_intermediate_size": 32, "hidden_size": 48, "intermediate_size": 80}
        tensors = tiny.random_tensors(
            {k: v for k, v in config.items() if k != "quantization_config"}, "bfloat16"
        )
        stored, _, _ = quantize.quantize(tensors, method, is_matrix, BLOCK)
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    change(model, 1.5)
    jaxmoe.save_pretrained(model, folders.export, quantization=quantization)
    expected = jaxmoe.from_pretrained(folders.export, dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(folders.export, dtype=torch.bfloat16)
    experts = theirs.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16
    mine = dict(named(expected.pure_params()))
    gate_up = np.asarray(mine[where(model, "gate_up")])[-1]  # (E, G, F, D)
    down = np.asarray(mine[where(model, "down")])[-1]  # (E, D, F)
    if method == "mxfp4":
        gate_up, down = gate_up.transpose(0, 3, 2, 1), down.transpose(0, 2, 1)
    for array, tensor in ((gate_up, experts.gate_up_proj), (down, experts.down_proj)):
        array = np.ascontiguousarray(array).reshape(tensor.shape)
        np.testing.assert_array_equal(
            array.view(np.uint16), tensor.detach().contiguous().view(torch.uint16).numpy()
        )
