"""MiMo-V2-Flash: windows with sinks and twice the key-value heads, values narrower than keys, DeepSeek-V3's router."""

from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _attention(config: ConfigReader, kind: str) -> AttentionSpec:
    ropes, head_dim, sliding = config.take("rope_parameters"), common.head_dim(config), kind == _SLIDING
    if not isinstance(ropes.get(kind), dict):
        raise UserError(f"{config.file}: rope_parameters lack those of {kind!r}")
    given = dict(ropes[kind])
    if given.get("rope_type", "default") == "default":
        given.setdefault("partial_rotary_factor", 0.334)
    return AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads") * (2 if sliding else 1),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim, given),
        bias=config.take("attention_bias"),
        window=config.size("sliding_window") if sliding else None,
        value_dim=config.size("v_head_dim"),
        value_scale=config.number("attention_value_scale", 1.0),
        sinks=sliding,
    )


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
    config.expect("hidden_act", "silu")
    attention = common.kinds(config, "layer_types", (_SLIDING, _FULL))
    ffns = common.kinds(config, "mlp_layer_types", ("dense", "sparse"))
    for name, value in _published(config, attention, ffns).items():
        config.expect(name, value, None)
    config.expect("n_shared_experts", 0, None)
    config.take("sliding_window_size", None)  # the config class makes sliding_window of it
    mixers = {kind: _attention(config, kind) for kind in set(attention)}
    norm = NormSpec(config.number("rms_norm_eps"))
    blocks: dict[str, MLPSpec | MoESpec] = {
        "dense": MLPSpec(config.size("intermediate_size")),
        "sparse": MoESpec(
            router=common.grouped_sigmoid_router(config), hidden=config.size("moe_intermediate_size")
        ),
    }
    layers = [LayerSpec(mixers[mixer], blocks[ffn], norm) for mixer, ffn in zip(attention, ffns, strict=True)]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        Rule("layers.{L}.attention.sinks", LAYER + "self_attn.attention_sink_bias", "N"),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        common.correction_rule("mlp.gate.e_score_correction_bias"),
    )


FAMILY = Family(
    "mimo_v2_flash",
    _spec,
    _rules,
    ignored=(r"^model\.mtp\.",),
    unused_fields=frozenset({"attention_chunk_size", "auto_map", "partial_rotary_factor"}),
)
