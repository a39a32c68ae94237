"""MiniMax-M2 (MiniMax, 2025): sigmoid router with a constant, query and key norms in full, half of a head rotated."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
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
)
