"""Folders of models with latent attention as they are published: FP8 blocks, further layers, other names."""

import json

import families
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quantize
from helpers.quantized import BF16, BLOCK, bytes_of, is_matrix

import jaxmoe
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
from jaxmoe.params import named

PUBLISHED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
"""What DeepSeek-V3's config.json has beside sizes."""

GLM = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "ep_size": 1,
    "head_dim": 8,
    "indexer_rope_interleave": True,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "qk_head_dim": 20,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.2.dev0",
    "use_cache": True,
}
"""What GLM-5's has."""


def published_config(model_type="deepseek_v3", **fields):
    """Of Kimi K2 as of DeepSeek-V3, of GLM-5 with an indexer in every layer."""
    if model_type == "glm_moe_dsa":
        return {**families.config_json(model_type, index_topk_freq=1), **GLM, **fields}
    config = families.config_json("deepseek_v3" if model_type == "kimi_k2" else model_type)
    del config["rope_parameters"]
    return {**config, **PUBLISHED, "model_type": model_type, **fields}


def published_tensors(config):
    """Of the model in bfloat16, and of the layer that predicts the token after the next."""
    random = np.random.default_rng(0)
    tensors = {
        name: (0.2 * random.standard_normal(binding.shape)).astype(BF16)
        for name, binding in config_source(config).bindings.of_tensor.items()
    }
    depth, width, vocab = (config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    last, further = f"model.layers.{depth - 1}.", f"model.layers.{depth}."
    own = {"embed_tokens": (vocab, width), "shared_head.head": (vocab, width), "eh_proj": (width, 2 * width)}
    own |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (width,))
    return (
        tensors
        | {further + n.removeprefix(last): t for n, t in tensors.items() if n.startswith(last)}
        | {
            f"{further}{name}.weight": random.standard_normal(shape).astype(BF16)
            for name, shape in own.items()
        }
    )


@pytest.mark.torch
def test_no_correction_and_norms_that_dense_layers_do_not_use(tmp_path):
    """A.X K1's, which transformers' own model_type reads too."""
    import torch
    import transformers

    config = {**published_config("axk1"), "topk_method": "greedy"}
    tensors = published_tensors(config)
    assert not any("e_score_correction_bias" in name for name in tensors)
    unused = {"model.layers.0.post_mlp_layernorm.weight": np.full(config["hidden_size"], 2.0, BF16)}
    for name in ("axk1", "AXK1"):
        quantize.write(tmp_path / name, {**config, "model_type": name}, tensors | unused)
    model = jaxmoe.from_pretrained(tmp_path / "AXK1", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "axk1", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = np.arange(3, 40)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected, atol=1e-4 * np.abs(expected).max())
    jaxmoe.save_pretrained(model, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "AXK1")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa"])
def test_fp8_blocks(model_type, tmp_path):
    config = published_config(model_type)
    kept = ("head.head", "weights_proj")
    chosen = lambda name: is_matrix(name) and not any(part in name for part in kept)
    stored, plain, quantization = quantize.quantize(published_tensors(config), "fp8", chosen, BLOCK)
    scales = [name for name in stored if name.endswith("_scale_inv")]
    assert any("layers.4." in name for name in scales)
    indexed = any("layers.4." in name and "indexer.wq_b" in name for name in scales)
    assert indexed == (model_type in ("deepseek_v32", "glm_moe_dsa"))
    quantize.write(tmp_path / "fp8", {**config, "quantization_config": quantization}, stored)
    quantize.write(tmp_path / "plain", config, plain)
    model, same = (jaxmoe.from_pretrained(tmp_path / name, dtype="float32") for name in ("fp8", "plain"))
    for (name, ours), (_, expected) in zip(
        named(model.pure_params()), named(same.pure_params()), strict=True
    ):
        np.testing.assert_array_equal(ours, expected, err_msg=name)
    jaxmoe.save_pretrained(model, tmp_path / "again", quantization="source")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "fp8")
    jaxmoe.save_pretrained(model, tmp_path / "bfloat16")
    written, expected = bytes_of(tmp_path / "bfloat16"), bytes_of(tmp_path / "plain")
    assert json.loads(written.pop("config.json"))["model_type"] == model_type
    del expected["config.json"], written["model.safetensors.index.json"]
    del expected["model.safetensors.index.json"]
    assert jnp.isfinite(model(jnp.asarray([[3, 4, 5]]))).all()


def test_another_name_of_the_same_model():
    config = published_config()
    spec = config_source(config).spec
    other = config_source({**config, "model_type": "kimi_k2"})
    assert (other.spec, other.family) == (spec, FAMILIES["deepseek_v3"])
    assert spec.layers[0].mixer.scale == pytest.approx((0.1 * np.log(40) + 1) ** 2 / np.sqrt(20))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported; expected 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported; expected 'sigmoid'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported; expected 4"),
        ({"v_head_dim": 21}, "v_head_dim 21 is more than qk_nope_head_dim 12"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported; expected 1"),
    ],
)
def test_what_would_be_another_model_is_refused(fields, told):
    with pytest.raises(jaxmoe.UserError, match=told):
        config_source(published_config(**fields))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            {"model_type": "mistral"},
            "model_type = 'mistral' of text_config is not supported; expected 'mistral4'",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "llama_4_scaling_beta": 0.1,
                    "original_max_position_embeddings": 16,
                }
            },
            "rope type 'default' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "llama_4_scaling_beta = None",
        ),
        (
            {
                "rope_parameters": {
                    **families.config_json("mistral4")["rope_parameters"],
                    "partial_rotary_factor": 0.5,
                }
            },
            "rotates 10 features: expected qk_rope_head_dim of them, 8",
        ),
    ],
)
def test_other_text_models_of_the_same_folder_are_refused(text, told):
    with pytest.raises(jaxmoe.UserError, match=told):
        config_source(families.config_json("mistral3", {"text_config": text}))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"indexer_types": ["shared", "full", "full", "full"]},
            "indexer_types begin with 'shared': expected 'full'",
        ),
        ({"indexer_types": ["full"] * 3}, "indexer_types = .*: expected 4 entries, each 'full' or 'shared'"),
        (
            {"indexer_rope_interleave": False},
            "indexer_rope_interleave = False is not supported; expected True",
        ),
        ({"index_head_dim": 7}, "index_head_dim 7 is less than qk_rope_head_dim 8"),
        ({"index_topk": 0}, "index_topk = 0: expected a positive integer"),
        ({"q_lora_rank": None}, "q_lora_rank"),
    ],
)
def test_indexers_that_cannot_be(fields, told):
    with pytest.raises(jaxmoe.UserError, match=told):
        config_source(published_config("glm_moe_dsa", **fields))
