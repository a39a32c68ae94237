"""MiniMax-M2 (MiniMax, 2025): sigmoid router with a constant, query and key norms in full, half of a head rotated."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_qk_norm": True,
    "use_routing_bias": True,
}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    depth = config.size("num_hidden_layers", MAX_LAYERS)
    config.expect("sliding_window", None)
    config.expect("attn_type_list", [1] * depth, None)
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim = common.head_dim(config)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=rope_spec(config, head_dim),
            qk_norm=QKNorm(norm, "full"),
        ),
        ffn=MoESpec(
            router=RouterSpec(
                num_experts=config.size("num_local_experts"),
                top_k=config.size("num_experts_per_tok"),
                renormalize=True,
                weight_dtype="float32",
                score="sigmoid",
                correction="score",
                jitter=config.number("router_jitter_noise", 0.0, zero=True),
            ),
            hidden=config.size("intermediate_size"),
        ),
        norm=norm,
    )
    return common.model_spec(config, [layer] * depth, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(query_norm="Q", key_norm="U"),
        *common.expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
        common.correction_rule("block_sparse_moe.e_score_correction_bias"),
    )


FAMILY = Family(
    "minimax_m2",
    _spec,
    _rules,
    unused_fields=frozenset(
        {
            "layernorm_full_attention_beta",
            "layernorm_linear_attention_beta",
            "layernorm_mlp_beta",
            "mlp_intermediate_size",
            "mtp_transformer_layers",
            "num_mtp_modules",
            "partial_rotary_factor",
            "rotary_dim",  # transformers' config makes it a part of rope_parameters
            "shared_moe_mode",
            "use_mtp",
        }
    ),
)
