"""Solar Open (Upstage, 2025): every layer sparse, DeepSeek-V3's router, one shared expert."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    config.expect("first_k_dense_replace", 0, None)  # transformers' model has no dense layers
    config.expect("use_qk_norm", False, None)  # nor these
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, hidden = common.head_dim(config), config.size("moe_intermediate_size")
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=rope_spec(config, head_dim, whole=True),
            bias=config.take("attention_bias"),
        ),
        ffn=MoESpec(
            router=common.grouped_sigmoid_router(config),
            hidden=hidden,
            shared=SharedSpec(MLPSpec(hidden * config.size("n_shared_experts"))),
        ),
        norm=norm,
    )
    return common.model_spec(config, [layer] * config.size("num_hidden_layers", MAX_LAYERS), norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        common.correction_rule("mlp.gate.e_score_correction_bias"),
        *common.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "solar_open",
    _spec,
    _rules,
    # Of dense layers, which there are none; and what transformers' config makes a part of rope_parameters.
    unused_fields=frozenset({"intermediate_size", "partial_rotary_factor"}),
)
