"""Flint: windows with rope and full layers without, a sink per head, sigmoid routing beside a shared expert."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"), "rms_float32")
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    rope = rope_spec(config, head_dim)
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=config.take("norm_topk_prob"),
            weight_dtype="float32",
            score="sigmoid",
            logits_dtype="float32",
            float32=True,
        ),
        hidden=config.size("moe_intermediate_size"),
        shared=SharedSpec(MLPSpec(config.size("shared_expert_intermediate_size"))),
    )
    dense = MLPSpec(config.size("intermediate_size"))
    dense_layers, step = config.take("mlp_only_layers"), config.size("decoder_sparse_step", MAX_LAYERS)
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=None if window is None else rope,
                qk_norm=QKNorm(norm, "head"),
                bias=bias,
                output_bias=bias,
                window=window,
                sinks=True,
            ),
            dense if index in dense_layers or (index + 1) % step else sparse,
            norm,
        )
        for index, window in enumerate(common.windows(config))
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        Rule("layers.{L}.attention.sinks", LAYER + "self_attn.softmax_offset", "N"),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        *common.shared_rules("mlp.shared_expert"),
    )


FAMILY = Family("flint", _spec, _rules)
