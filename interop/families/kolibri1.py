"""Kolibri-1: windows with rope and full layers without, norms on both sides, experts chosen by biased logits."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attn_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_ffn_norm",
}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm, head_dim = NormSpec(config.number("rms_norm_eps")), common.head_dim(config)
    rope = rope_spec(config, head_dim)
    config.size("sliding_window")  # without one transformers' model does not run
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=config.take("norm_topk_prob"),
            weight_dtype="float32",
            score="sigmoid",
            logits_dtype="float32",
            correction="logit",
        ),
        hidden=config.size("moe_intermediate_size"),
        shared=SharedSpec(MLPSpec(config.size("shared_expert_intermediate_size"))),
    )
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=None if window is None else rope,
                qk_norm=QKNorm(norm, "head"),
                window=window,
            ),
            sparse,
            norm,
            placement="sandwich",
        )
        for window in common.windows(config)
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(_NORMS),
        *common.attention_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        *common.shared_rules("mlp.shared_experts"),
        common.correction_rule("moe.router.expert_bias"),
    )


FAMILY = Family("kolibri1", _spec, _rules)
