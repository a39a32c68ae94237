"""config.json: published files, both generations of spellings, and everything that is refused."""

import copy
import json
import math
import os
import random
import re

import families
import pytest
from helpers import published, tiny

from jaxmoe import UserError
from jaxmoe.interop.config_json import read_config
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.source import config_source
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.mixers.rope import Dynamic, Linear, Llama3, LongRope, RopeSpec, Yarn
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerGroup, LayerSpec, ModelSpec, group_layers

MIXTRAL, QWEN, OLMOE = (published.CONFIGS[name] for name in ("Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B"))

GLM = families.config_json("glm4_moe")


def spec_of(config, *, without=(), **changes):
    config = {name: value for name, value in config.items() if name not in without} | changes
    return FAMILIES[config["model_type"]].spec(config, "config.json")


def layer_of(config, **changes):
    """The one layer that all layers of a model are."""
    (group,) = spec_of(config, **changes).groups
    (layer,) = group.pattern
    return layer


def refusal(config, **changes):
    with pytest.raises(UserError) as caught:
        spec_of(config, **changes)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


def model_spec(rope, attention, router, hidden, *, width, vocab, layers, eps):
    norm = NormSpec(eps)
    if "qk_norm" in attention:
        attention = attention | {"qk_norm": QKNorm(norm, attention["qk_norm"])}
    layer = LayerSpec(AttentionSpec(rope=rope, **attention), MoESpec(router, hidden), norm)
    return ModelSpec(width, vocab, (LayerGroup((layer,), layers),), norm, tie_embeddings=False, init_std=0.02)


PUBLISHED_SPECS = {
    "Mixtral-8x7B": model_spec(
        RopeSpec(1e6, 128),
        {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
        RouterSpec(8, 2, renormalize=True, weight_dtype="float32"),
        14336,
        width=4096,
        vocab=32000,
        layers=32,
        eps=1e-5,
    ),
    "Mixtral-8x22B": model_spec(
        RopeSpec(1e6, 128),
        {"num_heads": 48, "num_kv_heads": 8, "head_dim": 128},
        RouterSpec(8, 2, renormalize=True, weight_dtype="float32"),
        16384,
        width=6144,
        vocab=32768,
        layers=56,
        eps=1e-5,
    ),
    "Qwen3-30B-A3B": model_spec(
        RopeSpec(1e6, 128),
        {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
        RouterSpec(128, 8, renormalize=True, weight_dtype="model"),
        768,
        width=2048,
        vocab=151936,
        layers=48,
        eps=1e-6,
    ),
    "Qwen3-235B-A22B": model_spec(
        RopeSpec(1e6, 128),
        {"num_heads": 64, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
        RouterSpec(128, 8, renormalize=True, weight_dtype="model"),
        1536,
        width=4096,
        vocab=151936,
        layers=94,
        eps=1e-6,
    ),
    "Qwen3-Coder-30B-A3B": model_spec(
        RopeSpec(1e7, 128),
        {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
        RouterSpec(128, 8, renormalize=True, weight_dtype="model"),
        768,
        width=2048,
        vocab=151936,
        layers=48,
        eps=1e-6,
    ),
    "OLMoE-1B-7B": model_spec(
        RopeSpec(1e4, 128),
        {"num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "qk_norm": "full"},
        RouterSpec(64, 8, renormalize=False, weight_dtype="model"),
        1024,
        width=2048,
        vocab=50304,
        layers=16,
        eps=1e-5,
    ),
}


class TestPublished:
    @pytest.mark.parametrize("name", published.CONFIGS)
    def test_gives_its_spec(self, name):
        assert spec_of(published.CONFIGS[name]) == PUBLISHED_SPECS[name]

    @pytest.mark.parametrize("name", published.CONFIGS)
    def test_is_read_from_a_file_and_left_as_it_is(self, name, tmp_path):
        config = published.CONFIGS[name]
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        blueprint = config_source(path)
        assert (blueprint.spec, blueprint.raw) == (PUBLISHED_SPECS[name], config)

    @pytest.mark.torch
    @pytest.mark.parametrize("name", published.CONFIGS)
    def test_saved_again_by_transformers_gives_the_same_spec(self, name, tmp_path):
        from transformers import AutoConfig

        AutoConfig.for_model(**published.CONFIGS[name]).save_pretrained(tmp_path)
        again = read_config(tmp_path / "config.json")
        assert "rope_theta" not in again  # the new spelling
        assert spec_of(again) == PUBLISHED_SPECS[name]

    def test_rotation_is_not_filled_in_within_the_caller_s_object(self):
        config = QWEN | {"rope_scaling": {"type": "linear", "factor": 2.0}}
        before = copy.deepcopy(config)
        spec_of(config)
        assert config == before


ORIGINAL = {"original_max_position_embeddings": 8192}
STRETCHED = [
    ("linear", {"factor": 2.5}, Linear(2.5)),
    ("dynamic", {"factor": 3.0}, Dynamic(3.0, 40960)),
    ("yarn", {"factor": 4.0} | ORIGINAL, Yarn(4.0, 8192, pytest.approx(1 + 0.1 * math.log(4)))),
    ("yarn shrunk", {"factor": 0.5} | ORIGINAL, Yarn(0.5, 8192, 1.0)),
    ("yarn of the whole length", {"factor": 4.0}, Yarn(4.0, 40960, pytest.approx(1 + 0.1 * math.log(4)))),
    (
        "yarn with all entries",
        {"factor": 4.0, "beta_fast": 16, "beta_slow": 2.0, "attention_factor": 1.5, "truncate": False}
        | ORIGINAL,
        Yarn(4.0, 8192, 1.5, beta_fast=16, beta_slow=2.0, truncate=False),
    ),
    (
        "yarn with mscale",
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5} | ORIGINAL,
        Yarn(40.0, 8192, pytest.approx((1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)))),
    ),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
        Llama3(8.0, 1.0, 4.0, 8192),
    ),
    (
        "longrope",
        {"short_factor": [1.5] * 64, "long_factor": [9.0] * 64, "factor": 4.0} | ORIGINAL,
        LongRope((1.5,) * 64, (9.0,) * 64, 8192, pytest.approx(math.sqrt(1 + math.log(4) / math.log(8192)))),
    ),
    (
        "longrope by its lengths",
        {"short_factor": [1.5] * 64, "long_factor": [9.0] * 64} | ORIGINAL,
        LongRope((1.5,) * 64, (9.0,) * 64, 8192, pytest.approx(math.sqrt(1 + math.log(5) / math.log(8192)))),
    ),
]


class TestSpellings:
    """rope_theta and rope_scaling are of transformers 4, rope_parameters of 5."""

    @pytest.mark.parametrize("kind", ["type", "rope_type"])
    @pytest.mark.parametrize(
        ("entries", "scaling"), [case[1:] for case in STRETCHED], ids=[case[0] for case in STRETCHED]
    )
    def test_of_a_stretched_rotation(self, entries, scaling, kind):
        entries = {kind: type(scaling).__name__.lower()} | entries
        old = layer_of(QWEN, rope_scaling=entries, rope_theta=5e5).mixer.rope
        assert (old.theta, old.rotary_dim, type(old.scaling)) == (5e5, 128, type(scaling))
        assert vars(old.scaling) == vars(scaling)
        new = entries | {"rope_theta": 5e5}
        assert layer_of(QWEN, without=("rope_theta", "rope_scaling"), rope_parameters=new).mixer.rope == old

    @pytest.mark.parametrize("config", [MIXTRAL, QWEN, OLMOE], ids=["mixtral", "qwen3_moe", "olmoe"])
    def test_of_a_plain_rotation(self, config):
        expected = spec_of(config, rope_theta=123.0)
        without = ("rope_theta", "rope_scaling")
        for entries in ({"rope_type": "default"}, {"type": "default"}, {}):
            new = entries | {"rope_theta": 123.0}
            assert spec_of(config, without=without, rope_parameters=new) == expected
        assert spec_of(config, without=without, rope_theta=123.0, rope_parameters=None) == expected

    def test_of_a_rotation_without_theta(self):
        assert layer_of(MIXTRAL, without=["rope_theta"]).mixer.rope.theta == 1e6
        assert layer_of(OLMOE, without=["rope_theta"]).mixer.rope.theta == 1e4

    def test_of_a_partial_rotation(self):
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = {name: value for name, value in GLM.items() if name != "rope_parameters"}
        for quarter in (
            {"rope_parameters": rope | {"partial_rotary_factor": 0.25}},
            {"rope_parameters": rope, "partial_rotary_factor": 0.25},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        ):
            mixers = {layer.mixer.rope for layer in spec_of(config, **quarter).layers}
            assert mixers == {RopeSpec(1e4, 4)}
            assert "partial_rotary_factor = 0.25" in refusal(QWEN, **quarter)
        assert spec_of(QWEN, partial_rotary_factor=1.0) == spec_of(QWEN)

    @pytest.mark.parametrize("config", [MIXTRAL, QWEN, OLMOE], ids=["mixtral", "qwen3_moe", "olmoe"])
    def test_of_the_number_of_experts(self, config):
        count = 16
        specs = [
            spec_of(config, without=("num_experts", "num_local_experts"), **{name: count})
            for name in ("num_experts", "num_local_experts")
        ]
        assert specs[0] == specs[1]
        assert specs[0].layers[0].ffn.router.num_experts == count
        message = refusal(config, num_experts=16, num_local_experts=32)
        assert re.search(
            "num_experts = 16 and num_local_experts = 32|num_local_experts = 32 and num_experts = 16", message
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
    def test_of_the_dtype(self, dtype):
        expected = spec_of(QWEN)
        assert spec_of(QWEN, torch_dtype=dtype) == expected
        assert spec_of(QWEN, without=["torch_dtype"], dtype=dtype) == expected

    def test_defaults_are_those_of_the_family(self):
        minimal = {"model_type": "qwen3_moe"}
        layer = layer_of(minimal)
        assert (layer.mixer.num_heads, layer.mixer.head_dim, layer.ffn.router.top_k) == (32, 2048 // 32, 8)
        assert layer.mixer.window is None

    def test_of_fields_that_transformers_saves_by_an_alias(self):
        """Published configs of Kimi Linear have these, its config class others."""
        config = families.config_json("kimi_linear")
        names = {
            "num_experts": "num_local_experts",
            "num_shared_experts": "n_shared_experts",
            "num_experts_per_token": "num_experts_per_tok",
            "num_expert_group": "n_group",
        }
        other = {names.get(name, name): value for name, value in config.items()}
        assert other.keys() != config.keys()
        assert spec_of(other) == spec_of(config)
        with pytest.raises(UserError, match="mean the same; keep one"):
            spec_of(config | {"n_group": 1})


class TestVariants:
    def test_window(self):
        assert layer_of(MIXTRAL, sliding_window=4096).mixer.window == 4096
        assert layer_of(QWEN, sliding_window=4096).mixer.window is None
        assert layer_of(QWEN, sliding_window=4096, use_sliding_window=True).mixer.window == 4096
        assert (
            layer_of(QWEN, sliding_window=4096, use_sliding_window=True, max_window_layers=3).mixer.window
            == 4096
        )

    def test_router_and_attention(self):
        assert layer_of(MIXTRAL, router_jitter_noise=0.1).ffn.router.jitter == 0.1
        assert layer_of(QWEN, norm_topk_prob=False).ffn.router.renormalize is False
        assert layer_of(OLMOE, norm_topk_prob=True).ffn.router.renormalize is True
        assert layer_of(OLMOE, clip_qkv=8.0).mixer.clip_qkv == 8.0
        assert layer_of(OLMOE, attention_bias=True).mixer.bias is True
        assert layer_of(QWEN, attention_bias=True).mixer.bias is True
        assert layer_of(OLMOE, num_key_value_heads=None).mixer.num_kv_heads == 16
        assert layer_of(MIXTRAL, head_dim=64).mixer.head_dim == 64

    @pytest.mark.parametrize("name", ["granitemoe", "granitemoeshared"])
    @pytest.mark.parametrize("kind", ["rope", None])
    def test_position_embeddings_of_granite(self, name, kind):
        config = families.config_json(name)
        assert spec_of(config, position_embedding_type=kind) == spec_of(config)

    @pytest.mark.parametrize("config", [MIXTRAL, QWEN, OLMOE], ids=["mixtral", "qwen3_moe", "olmoe"])
    def test_what_other_programs_note_down_changes_nothing(self, config):
        assert spec_of(config, unsloth_fixed=True, unsloth_version="2025.5") == spec_of(config)

    def test_model(self):
        assert spec_of(MIXTRAL, tie_word_embeddings=True).tie_embeddings is True
        assert spec_of(MIXTRAL, initializer_range=0.5).init_std == 0.5
        assert (
            spec_of(MIXTRAL, rms_norm_eps=1e-3).norm
            == layer_of(MIXTRAL, rms_norm_eps=1e-3).norm
            == NormSpec(1e-3)
        )

    @pytest.mark.parametrize(
        ("step", "dense_layers", "pattern"),
        [
            (1, [], "SSSSSSS"),
            (1, None, "SSSSSSS"),
            (1, [0], "DSSSSSS"),
            (1, [0, 1, 2], "DDDSSSS"),
            (1, [3, 5, 99], "SSSDSDS"),
            (2, [], "DSDSDSD"),
            (3, [], "DDSDDSD"),
            (2, [3], "DSDDDSD"),
            (8, [], "DDDDDDD"),
        ],
    )
    def test_dense_layers_among_sparse_ones(self, step, dense_layers, pattern):
        spec = spec_of(QWEN, num_hidden_layers=7, decoder_sparse_step=step, mlp_only_layers=dense_layers)
        assert "".join("D" if isinstance(layer.ffn, MLPSpec) else "S" for layer in spec.layers) == pattern
        assert {layer.ffn.hidden for layer in spec.layers} == {
            {"D": 6144, "S": 768}[kind] for kind in pattern
        }
        assert spec.groups == group_layers(spec.layers)


class TestGroups:
    """Layers are letters here: grouping looks at equality only."""

    @pytest.mark.parametrize(
        ("layers", "groups"),
        [
            ("", []),
            ("A", [("A", 1)]),
            ("AAAA", [("A", 4)]),
            ("DDD" + "S" * 58, [("D", 3), ("S", 58)]),
            ("D" + "S" * 47, [("D", 1), ("S", 47)]),
            ("ABABAB", [("AB", 3)]),
            ("DSDSD", [("DS", 2), ("D", 1)]),
            ("LLLF" * 10, [("LLLF", 10)]),
            ("AABAAB", [("AAB", 2)]),
            ("ABC", [("A", 1), ("B", 1), ("C", 1)]),
            ("SSSDSDS", [("S", 3), ("DS", 2)]),
        ],
    )
    def test_examples(self, layers, groups):
        assert group_layers(layers) == tuple(
            LayerGroup(tuple(pattern), repeats) for pattern, repeats in groups
        )

    def test_any_list_unrolls_to_itself(self):
        rng = random.Random(0)
        for _ in range(500):
            layers = "".join(rng.choices("ABC"[: rng.randint(1, 3)], k=rng.randint(0, 25)))
            groups = group_layers(layers)
            assert "".join("".join(group.pattern) * group.repeats for group in groups) == layers
            assert all(group.repeats >= 1 and group.pattern for group in groups)

    def test_locate_is_the_place_in_the_unrolled_list(self):
        spec = spec_of(QWEN, num_hidden_layers=11, decoder_sparse_step=2, mlp_only_layers=[9])
        for index, layer in enumerate(spec.layers):
            group, place, repeat = spec.locate(index)
            assert spec.groups[group].pattern[place] == layer
            assert repeat < spec.groups[group].repeats
        assert len({spec.locate(index) for index in range(11)}) == len(spec.layers) == 11
        with pytest.raises(IndexError, match="past the last of 11"):
            spec.locate(11)


class TestRefused:
    @pytest.mark.parametrize("config", [MIXTRAL, QWEN, OLMOE], ids=["mixtral", "qwen3_moe", "olmoe"])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_hidden_layer": 3},
                r"unknown field 'num_hidden_layer' \(did you mean 'num_hidden_layers'\?\)",
            ),
            ({"zzz": None}, r"unknown field 'zzz'$"),
            ({"quantization_config": {"quant_method": "fp8"}}, "unknown field 'quantization_config'"),
            ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; expected 'silu'"),
            ({"torch_dtype": "bfloat61"}, "torch_dtype = 'bfloat61': expected bfloat16, float16, "),
            ({"dtype": 2}, "dtype = 2: expected bfloat16, float16, "),
            ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1 is not supported \(only 0\.0\)"),
            ({"hidden_size": "40"}, "'hidden_size' expected int, got str"),
            ({"hidden_size": 40.5}, "'hidden_size' expected int, got float"),
            ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
            ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' expected bool, got str"),
            ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a positive integer"),
            ({"num_attention_heads": -4}, "num_attention_heads = -4: expected a positive integer"),
            ({"vocab_size": 0}, "vocab_size = 0: expected a positive integer"),
            ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: expected a positive integer"),
            ({"num_experts_per_tok": 500}, r"num_experts_per_tok 500 is more than the \d+ experts"),
            (
                {"num_key_value_heads": 7},
                r"num_attention_heads \d+ is not divisible by num_key_value_heads 7",
            ),
            (
                {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
                "rope type 'spiral' is not supported; supported: .*yarn",
            ),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "wobble": 1, "wiggle": 2}},
                "of type 'yarn' have unknown entries wiggle, wobble",
            ),
            (
                {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
                "unknown entries mrope_section",
            ),
            ({"rope_scaling": {"type": "linear"}}, "factor"),
            (
                {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
                r"factor = 4\.0 of rope type 'default': expected 1 or no such entry",
            ),
            (
                {"rope_scaling": {"type": "linear", "factor": "2"}},
                "factor = '2' .* expected a positive number",
            ),
            ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0 .* expected a positive number"),
            ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
            ({"rope_scaling": "yarn"}, "yarn"),
            ({"rope_theta": 10**400}, "rope_theta = 1000.* expected a positive number"),
            ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000: expected at most 1,000"),
            ({"num_hidden_layers": True}, "num_hidden_layers"),
            ({"vocab_size": 10**30}, "vocab_size = .*: expected at most 10,000,000"),
            ({"head_dim": True}, "head_dim"),
            (
                {"head_dim": 1},
                "width 1 .* would rotate 1 features: expected an even number of them from 2 to 1",
            ),
            ({"head_dim": 15}, "an even .*15"),  # found by transformers' class, where it checks that
            ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan: expected a positive number"),
            ({"rms_norm_eps": 0.0}, r"rms_norm_eps = 0\.0: expected a positive number"),
            ({"initializer_range": math.nan}, "initializer_range = nan: expected 0 or a positive number"),
            ({"initializer_range": math.inf}, "initializer_range = inf: expected 0 or a positive number"),
            ({"initializer_range": -0.02}, r"initializer_range = -0\.02: expected 0 or a positive number"),
            (
                {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 3}, "rope_scaling": None},
                r"partial_rotary_factor = 3 is not supported; expected 1\.0",
            ),
            (
                {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
                r"rope_theta = 1\.0 of rope type 'yarn': expected a number above 1",
            ),
            (
                {
                    "rope_scaling": {
                        "type": "llama3",
                        "factor": 2.0,
                        "low_freq_factor": 4.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8,
                    }
                },
                r"high_freq_factor = 4\.0 .* expected more than low_freq_factor, 4\.0",
            ),
            ({"rope_theta": "1e6"}, "rope_theta = '1e6' .* expected a positive number"),
        ],
    )
    def test_by_every_family(self, config, changes, message):
        assert re.search(message, refusal(config, **changes))

    @pytest.mark.parametrize(
        ("config", "changes", "message"),
        [
            (
                QWEN,
                {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 64}},
                "short_factor .* expected 64 positive numbers",
            ),
            (
                GLM,
                {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 3}},
                "partial_rotary_factor 3 would rotate 48 features",
            ),
            *(
                (families.config_json(name), {"position_embedding_type": "nope"}, "expected 'rope' or None")
                for name in ("granitemoe", "granitemoeshared")
            ),
            (QWEN, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: expected a positive integer"),
            (QWEN, {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
            (QWEN, {"moe_intermediate_sise": 3}, r"did you mean 'moe_intermediate_size'\?"),
            (
                QWEN,
                {"shared_expert_intermediate_size": 64},
                "shared_expert_intermediate_size = 64 is not supported; expected 0 or None",
            ),
            (QWEN, {"qkv_bias": True}, "qkv_bias = True is not supported; expected False or None"),
            (QWEN, {"use_qk_norm": False}, "use_qk_norm = False is not supported; expected True or None"),
            (QWEN, {"clip_qkv": 8.0}, "unknown field 'clip_qkv'"),
            (MIXTRAL, {"sliding_window": 0}, "sliding_window = 0: expected a positive integer or null"),
            (MIXTRAL, {"sliding_window": True}, "sliding_window"),
            (
                MIXTRAL,
                {"router_jitter_noise": math.nan},
                "router_jitter_noise = nan: expected 0 or a positive",
            ),
            (OLMOE, {"clip_qkv": math.nan}, "clip_qkv = nan: expected a positive number"),
            (MIXTRAL, {"head_dim": 0}, "head_dim = 0: expected a positive integer"),
            (MIXTRAL, {"qkv_bias": False}, "unknown field 'qkv_bias'"),
            (OLMOE, {"use_qk_norm": True}, "unknown field 'use_qk_norm'"),
            (
                MIXTRAL,
                {"num_attention_heads": 24},
                "hidden_size 4096 is not divisible by num_attention_heads 24",
            ),
            (
                families.config_json("gpt_oss"),
                {"num_hidden_layers": 10**12},
                "num_hidden_layers = 1000000000000: expected at most 1,000",
            ),
            (
                MIXTRAL,
                {"per_layer_config": {"1": {"num_key_value_heads": 4}}},
                "per_layer_config gives layers different values of num_key_value_heads",
            ),
            (
                families.config_json("gemma4_text"),
                {"per_layer_config": {"1": {"hidden_size": 48}}},
                "per_layer_config has 'hidden_size': supported are 'head_dim' and 'num_key_value_heads'",
            ),
            (
                families.config_json("kimi_linear"),
                {"linear_attn_config": {"head_dim": 22, "num_heads": 3, "gate_lower_bound": -5.0}},
                "linear_attn_config has unknown entries 'gate_lower_bound'",
            ),
            (
                families.config_json("kimi_linear"),
                {"linear_attn_config": {"full_attn_layers": [3], "kda_layers": [1, 2]}},
                "field 'layer_types'",
            ),
            (
                families.config_json("kimi_linear"),
                {"num_nextn_predict_layers": 1},
                "num_nextn_predict_layers = 1 is not supported; expected 0 or None",
            ),
            (
                families.config_json("laguna"),
                {"gating": False},
                "gating = False is not supported; expected True or 'per-head' or 'per-element'",
            ),
            (
                families.config_json("laguna"),
                {"num_attention_heads_per_layer": [4, 6, 6, -8]},
                r"num_attention_heads_per_layer = \[4, 6, 6, -8\]: expected integers from 1",
            ),
            (
                families.config_json("laguna"),
                {"num_attention_heads_per_layer": [4, 6, 7, 8]},
                "num_attention_heads 7 is not divisible by num_key_value_heads 2",
            ),
            (
                families.config_json("laguna"),
                {"mlp_only_layers": [0, 1]},
                r"mlp_only_layers = \[0, 1\] is not supported; expected \[0\] or None",
            ),
            (
                families.config_json("laguna"),
                {
                    "rope_parameters": {
                        **families.config_json("laguna")["rope_parameters"],
                        "original_max_position_embeddings": 17,
                    }
                },
                "rope_parameters have unknown entries original_max_position_embeddings",
            ),
            (
                families.config_json("bailing_hybrid"),
                {"kda_lower_bound": 0.5},
                "kda_lower_bound = 0.5: expected a number below 0",
            ),
            (
                families.config_json("minimax"),
                {"postnorm": False},
                "postnorm = False is not supported; expected True or None",
            ),
            (
                families.config_json("qwen3_5_moe_text"),
                {"attn_output_gate": False},
                "attn_output_gate = False is not supported; expected True or None",
            ),
        ],
    )
    def test_by_one_family(self, config, changes, message):
        assert re.search(message, refusal(config, **changes))

    def test_several_fields_at_once(self):
        message = refusal(QWEN, colour="red", attention_dropout=0.5, hiden_size=1)
        assert all(
            part in message for part in ("'colour'", "attention_dropout = 0.5", "did you mean 'hidden_size'?")
        )


class TestFiles:
    def refusal(self, path):
        with pytest.raises(UserError) as caught:
            config_source(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing(self, tmp_path):
        assert "does not exist: expected the config.json" in self.refusal(tmp_path / "config.json")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"{'model_type': 'mixtral'}",
            b"\xff\xfe{}",
            b"not json",
            b"[" * 100_000,
            b'{"a": ' + b"9" * 5000 + b"}",
        ],
        ids=["empty", "open", "quotes", "bytes", "words", "nested", "digits"],
    )
    def test_not_json(self, tmp_path, content):
        path = tmp_path / "config.json"
        path.write_bytes(content)
        assert "is not readable JSON" in self.refusal(path)

    def test_pipe(self, tmp_path):
        path = tmp_path / "config.json"
        os.mkfifo(path)
        assert "it is a named pipe, expected a regular file" in self.refusal(path)

    def test_many_brackets_in_a_field(self, tmp_path):
        path = tmp_path / "config.json"
        for depth in (300, 900):
            path.write_text(json.dumps(QWEN)[:-1] + f', "colour": {"[" * depth}{"]" * depth}}}')
            self.refusal(path)

    def test_folder(self, tmp_path):
        assert "is not readable" in self.refusal(tmp_path)

    @pytest.mark.parametrize("content", [[], 3, None, "mixtral", {}, {"model_type": None}, {"model_type": 3}])
    def test_no_model_type(self, tmp_path, content):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        assert "expected a JSON object with a string 'model_type'" in self.refusal(path)

    def test_unknown_model_type(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(QWEN | {"model_type": "qwen3moe"}))
        message = self.refusal(path)
        assert "model_type 'qwen3moe' is not supported (did you mean 'qwen3_moe'?)" in message
        assert f"supported: {', '.join(sorted(FAMILIES))}" in message
        path.write_text(json.dumps({"model_type": "llama"}))
        assert "did you mean" not in self.refusal(path)

    def test_content_without_model_type(self):
        for config in ({}, {"model_type": 5}):
            with pytest.raises(UserError, match="expected a string 'model_type'"):
                from_config(config)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sizes_of_tiny_configs_are_distinct(family):
    """Also the parts of them on a mesh of 2 x 2 x 2: a swapped pair of axes has a wrong shape."""
    config = families.config_json(family)
    assert spec_of(config).vocab_size == config["vocab_size"]
    names = [name for name in config if name.endswith(("_size", "_experts", "_heads", "_layers", "_per_tok"))]
    whole = [config[name] for name in names]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kept = ("num_hidden_layers", "num_experts_per_tok")
    halves = [size if name in kept else size / 2 for name, size in zip(names, whole, strict=True)]
    for sizes in (whole, halves):
        assert len({*sizes, head}) == len(sizes) + 1
    assert all(size == int(size) for size in halves)
