"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router over grouped-query attention that rotates half of each head."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def text_spec(config: ConfigReader, qk_norm: bool, sections: bool = False) -> ModelSpec:
    """GLM-4.5, and the text model of GLM-4.5V.

    Args:
        config: of the text model.
        qk_norm: queries and keys are normed.
        sections: see `rope_spec`.
    """
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim = common.head_dim(config)
    attention = AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim, sections=sections),
        qk_norm=QKNorm(norm, "head") if qk_norm else None,
        bias=config.take("attention_bias"),
    )
    hidden = config.size("moe_intermediate_size")
    sparse = MoESpec(
        router=common.grouped_sigmoid_router(config),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(hidden * config.size("n_shared_experts"))),
    )
    dense, first = MLPSpec(config.size("intermediate_size")), config.take("first_k_dense_replace")
    layers = [
        LayerSpec(attention, dense if index < first else sparse, norm)
        for index in range(config.size("num_hidden_layers", MAX_LAYERS))
    ]
    return common.model_spec(config, layers, norm)


def _spec(config: ConfigReader) -> ModelSpec:
    return text_spec(config, config.take("use_qk_norm"))


def rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        common.correction_rule("mlp.gate.e_score_correction_bias"),
        *common.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "glm4_moe",
    _spec,
    rules,
    ignored=(r"^model\.layers\.(46|92)\.", r"\.rotary_emb\.inv_freq$"),  # predict the token after the next
    unused_fields=frozenset({"num_mtp_layers", "num_nextn_predict_layers", "partial_rotary_factor"}),
)
