"""Folders of models with recurrent mixers as they are published: their configs, and what they hold beside the model."""

import json

import families
import numpy as np
import pytest
from helpers import packed, quantize
from helpers.quantized import BF16, bytes_of
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.source import config_source
from jaxmoe.params import named

NEMOTRON = {
    "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
    "chunk_size": 128,
    "expand": 2,
    "hidden_dropout": 0.0,
    "hybrid_override_pattern": "ME*M-E",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "num_hidden_layers": 6,
    "num_logits_to_keep": 1,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "torch_dtype": "bfloat16",
    "use_mamba_kernels": True,
}
GRANITE = {
    "attention_dropout": 0.0,
    "init_method": "mup",
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_chunk_size": 256,
    "mamba_proj_bias": False,
    "normalization_function": "rmsnorm",
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "torch_dtype": "bfloat16",
}
JAMBA = {"num_logits_to_keep": 1, "sliding_window": None, "use_mamba_kernels": True}
LFM2 = {"conv_bias": False, "rope_theta": 10000.0, "tie_embedding": True}
CONFIGS = {"nemotron_h": NEMOTRON, "granitemoehybrid": GRANITE, "jamba": JAMBA, "lfm2_moe": LFM2}
"""What published configs have beside sizes, or in place of what transformers writes today."""

REPLACED = ("layers_block_type", "rope_parameters")


def published_config(name, **fields):
    tiny = {key: value for key, value in families.config_json(name).items() if key not in REPLACED}
    return {**tiny, **CONFIGS[name], **fields}


@pytest.mark.once
@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs(name):
    today = families.config_json(name)
    if name == "lfm2_moe":
        today["tie_word_embeddings"] = True
    assert config_source(published_config(name)).spec == config_source(today).spec


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("nemotron_h", {"use_bias": True}, "use_bias = True is not supported; expected False"),
        ("nemotron_h", {"n_groups": 4}, "6 heads are not divisible by its 4 groups"),
        ("nemotron_h", {"time_step_min": -1.0}, "time_step_min = -1.0: expected a positive number"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported"),
        (
            "granitemoehybrid",
            {"time_step_limit": [0.5, 0.1]},
            r"time_step_limit = \(0.5, 0.1\): expected two",
        ),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "= 'alibi' is not supported"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias = True is not supported"),
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias = True is not supported"),
        ("jamba", {"attn_layer_offset": 5}, "attention layer offset"),
        ("lfm2_moe", {"conv_bias": True}, "conv_bias = True is not supported"),
    ],
)
def test_refused_configs(name, fields, told):
    with pytest.raises(UserError, match=told):
        config_source(published_config(name, **fields))


def test_layers_for_speculative_decoding_are_kept(tmp_path):
    """Nemotron's have names of their own."""
    source = config_source(published_config("nemotron_h"))
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(binding.shape).astype(np.float32)
        for name, binding in source.bindings.of_tensor.items()
    }
    assert "backbone.layers.0.mixer.A_log" in tensors
    tensors["mtp.layers.0.mixer.up_proj.weight"] = random.standard_normal((3, 5)).astype(np.float32)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(published_config("nemotron_h", num_nextn_predict_layers=1))
    )
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folder, dtype="float32"), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_fp8_with_a_static_scale_per_tensor(folders):
    """As modelopt writes Nemotron 3: experts and projections, beside which the scale of activations lies."""
    config = published_config("nemotron_h")
    form, random = packed.FORMATS["modelopt fp8"], packed.random_of("modelopt fp8")
    stored, plain = {}, {}
    for name, binding in config_source(config).bindings.of_tensor.items():
        if not name.endswith(("_proj.weight", "in_proj.weight")):
            plain[name] = stored[name] = random.standard_normal(binding.shape).astype(BF16)
            continue
        parts, plain[name] = form.make(random, binding.shape)
        stored |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in parts.items()}
    assert "backbone.layers.0.mixer.in_proj.input_scale" in stored
    quantization = form.config | {"ignore": ["lm_head", "*.conv1d", "*.gate"]}
    quantize.write(folders.source, config | {"quantization_config": quantization}, stored)
    unquantised = folders.source.with_name("plain")
    quantize.write(unquantised, config, plain)
    model, same = (
        jaxmoe.from_pretrained(folder, dtype="float32") for folder in (folders.source, unquantised)
    )
    for (name, ours), (_, expected) in zip(
        named(model.pure_params()), named(same.pure_params()), strict=True
    ):
        np.testing.assert_array_equal(ours, expected, err_msg=name)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.export) == bytes_of(folders.source)
