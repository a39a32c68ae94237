"""MiMo-V2-Flash: windows with sinks and twice the key-value heads, values narrower than keys, DeepSeek-V3's router."""

import dataclasses
from typing import Any

from jaxmoe.interop.bounds import MAX_POSITIONS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec, rotation_of
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.spec import ModelSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _attention(config: ConfigReader, kind: str) -> AttentionSpec:
    given = dict(rotation_of(config, kind))
    if given.get("rope_type", "default") == "default":
        given.setdefault("partial_rotary_factor", 0.334)
    full = common.attention(
        config,
        rope_spec(config, given, partial=True),
        bias=config.take("attention_bias"),
        value_dim=config.size("v_head_dim"),
        value_scale=config.number("attention_value_scale", 1.0),
    )
    if kind == _FULL:
        return full
    window, kv_heads = config.size("sliding_window", MAX_POSITIONS), 2 * full.num_kv_heads
    return dataclasses.replace(full, num_kv_heads=kv_heads, window=window, sinks=True)


def _published(config: ConfigReader, attention: tuple[str, ...], ffns: tuple[str, ...]) -> dict[str, Any]:
    """Fields of the published config that transformers does not read, and what its model computes."""
    ropes = config.take("rope_parameters")
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    return {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "hybrid_layer_pattern": [int(kind == _SLIDING) for kind in attention],
        "layernorm_epsilon": config.number("rms_norm_eps"),
        "moe_layer_freq": [int(kind == "sparse") for kind in ffns],
        "rope_theta": (ropes.get(_FULL) or {}).get("rope_theta"),
        "scoring_func": "sigmoid",
        "swa_head_dim": common.head_dim(config),
        "swa_num_attention_heads": heads,
        "swa_num_key_value_heads": 2 * kv_heads,
        "swa_rope_theta": (ropes.get(_SLIDING) or {}).get("rope_theta"),
        "swa_v_head_dim": config.size("v_head_dim"),
        "topk_method": "noaux_tc",
    }


def _spec(config: ConfigReader) -> ModelSpec:
    attention = common.kinds(config, "layer_types", (_SLIDING, _FULL))
    common.check_constants(config, _published(config, attention, common.mlp_types(config)))
    config.expect("n_shared_experts", 0, None)
    config.take("sliding_window_size", None)  # the config class makes sliding_window of it
    mixers = {kind: _attention(config, kind) for kind in set(attention)}
    sparse = common.moe(config, common.grouped_sigmoid_router(config))
    return common.model_spec(
        config,
        [mixers[kind] for kind in attention],
        common.by_type(config, common.dense(config), sparse),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    sinks = Rule("layers.{L}.attention.sinks", LAYER + "self_attn.attention_sink_bias", "N")
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.correction_rules("mlp.gate.e_score_correction_bias"),
        attention=(sinks, *layouts.attention_rules()),
    )


FAMILY = Family(
    "mimo_v2_flash",
    _spec,
    _rules,
    ignored=(r"^model\.mtp\.",),
    unused_fields=frozenset({"attention_chunk_size", "auto_map"}),
)
