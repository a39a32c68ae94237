"""The same modules and parameters are adapted as PEFT adapts."""

import dataclasses

import families
import pytest
from helpers import adapters

import jaxmoe
from jaxmoe.interop.peft.anatomy import Anatomy, Module
from jaxmoe.interop.peft.config import parse_adapter_config
from jaxmoe.interop.peft.matching import match, resolve

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES = {
    "endings": (
        "qwen3_moe",
        {"target_modules": ["q_proj", "self_attn.o_proj", "model.layers.1.self_attn.v_proj"]},
    ),
    "expression": ("gpt_oss", {"target_modules": r".*\.layers\.[13]\.self_attn\.[qk]_proj"}),
    "all linear": ("gpt_oss", {"target_modules": "all-linear"}),
    "latent attention": ("deepseek_v3", {"target_modules": ["q_a_proj", "kv_b_proj"]}),
    "parameters": ("mixtral", {"target_modules": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "both": ("deepseek_v3", {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "biases of experts": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": ["down_proj_bias", *EXPERTS]},
    ),
    "a linear router": (
        "gemma4",
        {"target_modules": r".*language_model\..*(router\.proj|q_proj)", "target_parameters": EXPERTS},
    ),
    "head and embedding": ("gpt_oss", {"target_modules": ["lm_head", "embed_tokens"]}),
    "layers": ("gpt_oss", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2]}),
    "one layer": (
        "gpt_oss",
        {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "excluded": (
        "qwen3_moe",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
    ),
    "excluded by expression": (
        "qwen3_moe",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.layers\.[0-2]\..*"},
    ),
    "saved": ("gpt_oss", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "norm"]}),
    "ranks": (
        "gemma4_text",
        {
            "target_modules": ["q_proj", "v_proj", "k_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"q_proj": 5, r"layers\.[01]\.self_attn\.(q|v)_proj": 7, "down_proj": 2},
            "alpha_pattern": {
                r"model.layers.1.experts.gate_up_proj": 32,
                "^model.layers.0.self_attn.v_proj": 4,
            },
            "use_rslora": True,
        },
    ),
}


def _config(**fields):
    return parse_adapter_config(
        {"peft_type": "LORA", "r": 3, "lora_alpha": 11, **fields}, "adapter_config.json"
    )


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_matches_what_peft_matches(case):
    name, fields = CASES[case]
    model = families.torch_model(name)
    matched = match(_config(**fields), adapters.anatomy_of(model), "here")
    wrapped = adapters.adapted(model, r=3, lora_alpha=11, **fields)
    theirs = adapters.targets_of(wrapped)
    ours = {key: (target.rank, target.scale) for key, target in matched.targets.items()}
    assert ours == theirs
    saved = {
        key.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for key, _ in wrapped.named_parameters()
        if ".modules_to_save." in key
    }
    assert set(matched.saved) == saved


@pytest.mark.torch
def test_all_linear_leaves_routers_and_towers_to_peft():
    model = families.torch_model("gemma4")
    anatomy = adapters.anatomy_of(model)
    ours = match(_config(target_modules="all-linear"), anatomy, "here").targets.keys()
    theirs = adapters.targets_of(adapters.adapted(model, target_modules="all-linear")).keys()
    aside = {m.full("weight") for m in anatomy.modules if m.aside or m.kind == "router"}
    assert ours == theirs - aside < theirs


def _tiny():
    return Anatomy(
        (
            Module("model.embed_tokens", "embedding", {"weight": (50, 8)}),
            Module("model.layers.0.self_attn.q_proj", "linear", {"weight": (12, 8), "bias": (12,)}),
            Module("model.layers.0.mlp.gate", "router", {"weight": (4, 8)}),
            Module(
                "model.layers.0.mlp.experts", "other", {"gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3)}
            ),
            Module("model.layers.0.mixer.out_proj", "sealed", {"weight": (8, 12)}),
            Module("model.layers.0.mixer.conv1d", "convolution", {"weight": (12, 1, 4)}),
            Module("model.norm", "other", {"weight": (8,)}),
            Module("lm_head", "linear", {"weight": (50, 8)}),
        ),
        "lm_head",
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"target_modules": ["q_porj"]},
            r"'q_porj' matches nothing: expected names such as .*self_attn\.q_proj",
        ),
        ({"target_modules": "q_proj"}, r"target_modules: 'q_proj' matches nothing: .*q_proj"),
        ({"target_modules": ["norm"]}, "match model.norm, which is no linear layer and no embedding"),
        ({"target_modules": ["self_attn"]}, "match model.layers.0.self_attn, which is no linear layer"),
        ({"target_modules": ["out_proj"]}, r"match model.layers.0.mixer.out_proj, which PEFT cannot adapt"),
        ({"target_parameters": ["out_proj.weight"]}, r"mixer.out_proj.weight, which PEFT cannot adapt"),
        ({"target_modules": ["conv1d"]}, "match model.layers.0.mixer.conv1d, a convolution"),
        ({"target_modules": "a{99999999999}"}, "a pattern is no regular expression that can be used"),
        ({"target_modules": "q_proj("}, r"found 'q_proj\(', which is no regular expression"),
        (
            {"target_parameters": ["experts.up_proj"]},
            r"'experts\.up_proj' matches nothing: .*experts\.gate_up_proj",
        ),
        ({"target_parameters": ["norm.weight"]}, r"shape \[8\]: expected parameters of two or three axes"),
        (
            {"target_modules": ["gate"], "target_parameters": ["gate.weight"]},
            "by target_modules and by target_param",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["v_proj"]},
            "exclude_modules: 'v_proj' matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            "rank_pattern: 'k_proj' matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
            "modules_to_save: 'score' matches nothing",
        ),
        ({}, "match nothing that can be adapted: expected some of lm_head, model.layers.0.mlp.gate"),
    ],
)
def test_refuses_what_matches_nothing(fields, told):
    with pytest.raises(jaxmoe.UserError, match=told):
        match(_config(**fields), _tiny(), "here")


@pytest.mark.once
def test_lenient_matching_needs_one_pattern_alone():
    config = _config(target_modules=["q_proj", "no_such"])
    assert list(match(config, _tiny(), "here", strict=False).targets) == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    nothing = dataclasses.replace(_tiny(), modules=_tiny().modules[4:5])
    with pytest.raises(jaxmoe.UserError, match="match nothing that can be adapted"):
        match(config, nothing, "here", strict=False)


@pytest.mark.once
def test_keys_of_patterns_are_whole_endings():
    patterns = {"proj": 2, "q_proj.bias": 3, r"layers\.1\..*_proj": 4, "q_proj": 5}
    assert resolve(patterns, "model.layers.0.self_attn.q_proj", 1) == 5
    assert resolve(patterns, "model.layers.1.self_attn.q_proj", 1) == 4, "the first that matches"
    assert resolve(patterns, "model.layers.0.self_attn.o_proj", 1) == 1
