"""What is wrong with a folder in one of the newer formats stands in one line, tensors and config alike."""

import numpy as np
import pytest
from helpers import quantize, tiny
from helpers.packed import FORMATS, ct_config
from helpers.quantized import PACKED, bytes_of, folder_of, is_matrix

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.source import config_source, open_source
from jaxmoe.interop.storage import problems

pytestmark = pytest.mark.once  # What it says depends on the files alone.

Q, K, V, OUT = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def told(folder, config, tensors):
    quantize.write(folder, config, tensors, 1)
    with pytest.raises(UserError) as caught:
        open_source(folder)
    message = str(caught.value).removeprefix(f"{folder}: ")
    assert "\n" not in message
    return {part.removeprefix("tensor ") for part in message.split(" problems: ")[-1].split("; ")}


@pytest.fixture(autouse=True)
def all_problems(monkeypatch):
    """However many there are, and long their names."""
    monkeypatch.setattr(problems, "MAX_TOLD", 10**6)


def test_damaged_integers(folders):
    config, stored, plain = folder_of("int4 with zero points")
    del stored[f"{Q}.weight_scale"], stored[f"{K}.weight_packed"], stored[f"{V}.weight_shape"]
    stored[f"{OUT}.weight_packed"] = stored[f"{OUT}.weight_packed"].astype(np.int64)
    stored[f"{UP}.weight_zero_point"] = stored[f"{UP}.weight_zero_point"][1:]
    stored[f"{DOWN}.weight"] = plain[f"{DOWN}.weight"]
    found = told(folders.source, config, stored)
    others = {
        f"{name} goes with no quantised weight" for name in stored if name.startswith((f"{K}.", f"{OUT}."))
    }
    gone = {f"{name}.weight is missing" for name in (K, OUT)}
    assert found - others == gone | {
        f"{Q}.weight_scale is missing, which has the scales of {Q}.weight_packed",
        f"{V}.weight_shape is missing, which has the shape of {V}.weight_packed",
        f"{OUT}.weight_packed is I64 [96, 4], which is no weight of any scheme in the config",
        f"{UP}.weight_zero_point has shape [19, 3], expected [20, 3]: the zero points of {UP}.weight_packed",
        f"{DOWN}.weight is there twice, as it is and as {DOWN}.weight_packed: expected one of them",
    } | {
        f"{name} goes with no quantised weight"
        for name in stored
        if name.startswith(f"{DOWN}.weight_") and (not name.endswith("packed"))
    }


@pytest.mark.parametrize("kind", ["nvfp4", "modelopt nvfp4"])
def test_damaged_nvfp4(folders, kind):
    config, stored, _ = folder_of(kind)
    codes, whole = (
        ("weight_packed", "weight_global_scale") if kind == "nvfp4" else ("weight", "weight_scale_2")
    )
    del stored[f"{Q}.{whole}"]
    stored[f"{K}.weight_scale"] = stored[f"{K}.weight_scale"].astype(np.float32)
    stored[f"{V}.weight_scale"] = np.ascontiguousarray(stored[f"{V}.weight_scale"][:, :4])
    stored[f"{OUT}.{whole}"] = np.ones(2, np.float32)
    assert told(folders.source, config, stored) == {
        f"{Q}.{whole} is missing, which has the scale of all of {Q}.{codes}",
        f"{K}.weight_scale has dtype F32, expected F8_E4M3",
        f"{V}.weight_scale has shape [16, 4], expected [16, 6]: the scales of {V}.{codes}",
        f"{OUT}.{whole} has shape [2], expected [1, 1]: the scale of all of {OUT}.{codes}",
    }


def test_damaged_gptq(folders):
    config, stored, _ = folder_of("gptq")
    del stored[f"{Q}.g_idx"], stored[f"{K}.qweight"]
    stored[f"{V}.qzeros"] = np.ascontiguousarray(stored[f"{V}.qzeros"][:, :1])
    stored[f"{OUT}.scales"] = stored[f"{OUT}.scales"].astype(np.float64)
    stored[f"{UP}.bias"] = np.array([0, 0, 1], np.float16)
    assert told(folders.source, config, stored) == {
        f"{Q}.g_idx is missing, which has the groups of {Q}.qweight",
        *(f"{K}.{ending} goes with no .qweight" for ending in ("qzeros", "scales", "g_idx")),
        f"{K}.weight is missing",
        f"{V}.qzeros has shape [3, 1], expected [3, 2]: the zero points of {V}.qweight",
        f"{OUT}.scales has dtype F64, expected one of F16, BF16, F32",
        f"{UP}.bias is not part of the model",
    }


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_integers_of_other_bits_than_the_config_says(folders, kind):
    config, stored, _ = folder_of(kind)
    name = f"{DOWN}.qweight"
    stored[name] = np.repeat(stored[name], 2, 0 if kind == "gptq" else 1)
    problems = told(folders.source, config, stored)
    assert any(
        problem.startswith(f"{DOWN}.qzeros has shape") or "scales has shape" in problem
        for problem in problems
    )


def test_biases_of_zeros_are_no_part_of_the_model(folders):
    """AutoGPTQ stored one for every weight."""
    config, stored, _ = folder_of("gptq")
    stored |= {f"{name}.bias": np.zeros(size, np.float16) for name, size in ((Q, 32), (UP, 160))}
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.export) == bytes_of(folders.source)


@pytest.mark.parametrize("kind", ["fp8 per tensor", "int4", "modelopt nvfp4", "awq", "gptq"])
def test_a_config_that_says_so_of_weights_that_are_not(folders, kind):
    tensors = tiny.random_tensors(PACKED, "bfloat16")
    (problem,) = told(folders.source, PACKED | {"quantization_config": FORMATS[kind].config}, tensors) - {
        "remove quantization_config, or hf_quant_config.json, if they were dequantised"
    }
    assert problem.startswith(
        f"the config says that weights are quantised, but of {len(tensors)} tensors none is: found BF16, expected "
    )


def test_fp8_scales_of_a_shape_that_says_nothing(folders):
    config, stored, _ = folder_of("fp8 per row")
    stored[f"{Q}.weight_scale"] = np.ones((32, 2), np.float32)
    stored[f"{K}.weight_scale_inv"] = np.ones((16, 1), np.float32)
    assert told(folders.source, config, stored) == {
        f"{Q}.weight_scale has shape [32, 2], expected [1, 1]: the scales of {Q}.weight",
        f"{K}.weight has scales twice, {K}.weight_scale_inv and {K}.weight_scale: expected one",
    }


def test_fp8_codes_without_any_scale(folders):
    config, stored, _ = folder_of("fp8 per tensor")
    codes = {name for name in stored if is_matrix(name) and name.endswith(".weight")}
    stored = {name: array for name, array in stored.items() if not name.endswith("weight_scale")}
    assert told(folders.source, config, stored) == {
        f"{name}_scale_inv is missing, which has the scales of {name}" for name in codes
    }


GPTQ_FIELDS = {
    **{
        "tokenizer": None,
        "dataset": None,
        "damp_percent": 0.1,
        "act_group_aware": True,
        "true_sequential": True,
    },
    **{
        "meta": None,
        "backend": "auto",
        "model_seqlen": None,
        "block_name_to_quantize": None,
        "batch_size": 1,
    },
    **{"module_name_preceding_first_block": None, "pad_token_id": None, "max_input_length": None},
    **{"cache_block_outputs": True, "modules_in_block_to_quantize": None, "desc_act": False, "sym": True},
}
CT_FIELDS = {"moe_sparsity_config": None, "sparsity_config": {"format": "dense"}, "transform_config": {}}
ACTIVATIONS = {
    "num_bits": 4,
    "type": "float",
    "group_size": 16,
    "dynamic": "local",
    "observer": "static_minmax",
}


@pytest.mark.parametrize(
    "given",
    [
        GPTQ_FIELDS | {"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "gptq"},
        GPTQ_FIELDS
        | {"quant_method": "awq", "bits": 4, "group_size": 128, "format": "gemm", "version": "gemm"}
        | {"zero_point": True, "modules_to_not_convert": None},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
        | {"backend": "autoawq", "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None}
        | {"modules_to_fuse": None, "modules_to_not_convert": ["gate"]},
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "expert_dtype": "fp8",
        }
        | {
            "dequantize": False,
            "scale_fmt": "float",
            "modules_to_convert": None,
            "modules_to_not_convert": None,
        },
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": [], "producer": {}}
        | {"quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}}
        | {"config_groups": {}},
        CT_FIELDS
        | ct_config(
            "nvfp4-pack-quantized",
            ACTIVATIONS,
            num_bits=4,
            group_size=16,
            strategy="tensor_group",
            scale_dtype="torch.float8_e4m3fn",
            observer_kwargs={},
        ),
        CT_FIELDS | ct_config("float-quantized", ACTIVATIONS, strategy="channel", group_size=None),
    ],
)
def test_config_as_the_libraries_write_it(given):
    assert config_source(PACKED | {"quantization_config": given}).spec == config_source(PACKED).spec


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            FORMATS["gptq"].config | {"bits": 3},
            "quantization_config.bits = 3 is not supported; expected 4 or 8",
        ),
        (FORMATS["gptq"].config | {"bits": 2}, "bits = 2 is not supported; expected 4 or 8"),
        (FORMATS["gptq"].config | {"zz": 2}, "has unknown fields 'zz'; known are act_group_aware, "),
        (FORMATS["gptq"].config | {"group_size": 0}, "group_size = 0: expected a positive integer, or -1"),
        (
            FORMATS["gptq"].config | {"checkpoint_format": "marlin"},
            "checkpoint_format = 'marlin' is not supp",
        ),
        (
            FORMATS["gptq"].config | {"dynamic": {"+:.*": {"bits": 8}}},
            "dynamic = .* is not supported; expected modu",
        ),
        (FORMATS["awq"].config | {"version": "gemv"}, "version = 'gemv' is not supported; expected 'gemm'"),
        (FORMATS["awq"].config | {"bits": 8}, "bits = 8 is not supported; expected 4"),
        (FORMATS["awq"].config | {"group_size": None}, "group_size = None: expected a positive integer"),
        (
            FORMATS["modelopt fp8"].config | {"quant_algo": "NVFP4_AWQ"},
            "quant_algo = 'NVFP4_AWQ' is not supported",
        ),
        (FORMATS["modelopt fp8"].config | {"quantization": 3}, "quantization = 3: expected an object"),
        (
            ct_config("pack-quantized", **INT4 | {"num_bits": 3}),
            "group_0.weights.num_bits = 3 is not supported",
        ),
        (ct_config("pack-quantized", **INT4 | {"group_size": None}), "strategy 'group' needs one"),
        (ct_config("pack-quantized", **INT4 | {"zz": None}), "group_0.weights has unknown fields 'zz'"),
        (ct_config("pack-quantized", **INT4 | {"strategy": "token"}), "strategy = 'token' is not supported"),
        (
            ct_config("int-quantized", type="int", symmetric=False),
            "symmetric = False is supported for integers of 4",
        ),
        (
            ct_config("sparse-24-bitmask", **INT4),
            "format = 'sparse-24-bitmask' is not supported; expected 'pack-q",
        ),
        (
            ct_config("pack-quantized") | {"config_groups": {}},
            "config_groups = {}: expected an object of schemes",
        ),
        (
            ct_config("pack-quantized") | {"sparsity_config": {"format": "sparse-bitmask"}},
            "expected format 'dense'",
        ),
        (
            ct_config("pack-quantized") | {"config_groups": {"a": {"targets": []}}},
            "config_groups has no scheme of weights",
        ),
        (
            ct_config("pack-quantized", **INT4) | {"transform_config": {"config_groups": {"R1": {}}}},
            "transform_config = .* is not supported; expected {}",
        ),
        (
            ct_config("float-quantized", strategy="block", block_structure=[8]),
            r"block_structure = \[8\]: expected",
        ),
        (
            ct_config("nvfp4-pack-quantized", num_bits=4, group_size=64),
            "group_size = 64: expected 16 .* or 32",
        ),
    ],
)
def test_config(given, message):
    with pytest.raises(UserError, match=message) as caught:
        config_source(PACKED | {"quantization_config": given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: not JSON"),
        ("[]", "holds .*, expected an object with quantization"),
        ('{"quantization": {"quant_algo": "W4A8_AWQ"}}', "quant_algo = 'W4A8_AWQ' is not supported"),
    ],
)
def test_file_of_modelopt(folders, content, message):
    config, stored, _ = folder_of("modelopt nvfp4")
    del config["quantization_config"]
    quantize.write(folders.source, config, stored)
    (folders.source / "hf_quant_config.json").write_text(content)
    with pytest.raises(UserError, match=f"hf_quant_config.json.*{message}"):
        open_source(folders.source)
