"""FlexOlmo (arXiv 2507.07024): OLMoE's routing in layers whose norms come after attention and experts."""

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

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"), "rms_float32")
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    layer = LayerSpec(
        AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=rope_spec(config, head_dim, float32=True),
            qk_norm=QKNorm(norm, "full"),
            bias=bias,
            output_bias=bias,
        ),
        MoESpec(
            router=RouterSpec(
                num_experts=config.size("num_experts"),
                top_k=config.size("num_experts_per_tok"),
                renormalize=config.take("norm_topk_prob"),
                weight_dtype="model",
            ),
            hidden=config.size("intermediate_size"),
        ),
        norm,
        placement="post",
    )
    return common.model_spec(config, [layer] * config.size("num_hidden_layers", MAX_LAYERS), norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(_NORMS),
        *common.attention_rules(query_norm="Q", key_norm="U"),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
    )


FAMILY = Family("flex_olmo", _spec, _rules)
