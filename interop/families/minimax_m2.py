"""MiniMax-M2 (MiniMax, 2025): sigmoid router with a constant, query and key norms in full, half of a head rotated."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import QKNorm
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_qk_norm": True,
    "use_routing_bias": True,
}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD | {"attn_type_list": [1] * common.depth(config)})
    config.expect("sliding_window", None)
    norm = common.rms_norm(config)
    router = common.router(
        config,
        num_experts=config.size("num_local_experts"),
        renormalize=True,
        weight_dtype="float32",
        score="sigmoid",
        correction="score",
        jitter=config.number("router_jitter_noise", 0.0, zero=True),
    )
    return common.model_spec(
        config,
        common.attention(config, rope_spec(config, partial=True), qk_norm=QKNorm(norm, "full")),
        common.moe(config, router, "intermediate_size"),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
        *layouts.correction_rules("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        attention=layouts.attention_rules(query_norm="Q", key_norm="U"),
    )


def _whole_heads(config: Mapping[str, Any]) -> str | None:
    """Of modeling_minimax_m2.py: it read ``partial_rotary_factor`` alone, where nothing put rotary_dim."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary, width = config.get("rotary_dim"), config.get("head_dim", 128)
    if rotary in (None, width) or "partial_rotary_factor" in rope or "partial_rotary_factor" in config:
        return None
    return (
        f"rotated all {width} features of a head whatever rotary_dim says; read with rotary_dim = {rotary}, as the "
        f"original code and 5.18 and later do. If it was trained with that version, set rotary_dim to {width}"
    )


FAMILY = Family(
    "minimax_m2",
    _spec,
    _rules,
    speculative=("num_mtp_modules",),
    unused_fields=frozenset(
        {
            "layernorm_full_attention_beta",
            "layernorm_linear_attention_beta",
            "layernorm_mlp_beta",
            "mlp_intermediate_size",
            "mtp_transformer_layers",
            "rotary_dim",  # transformers' config makes it a part of rope_parameters
            "shared_moe_mode",
            "use_mtp",
        }
    ),
    mistakes=(Mistake((5, 0), (5, 18), _whole_heads),),
)
