"""Qwen2-MoE (arXiv 2407.10671): biases on queries, keys and values, a shared expert behind a gate of its own."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name in ("use_sliding_window", "max_window_layers"):
        config.take(name)  # layer_types and sliding_window already say what follows from them
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("qkv_bias")
    rope = rope_spec(config, head_dim, whole=True)
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=config.take("norm_topk_prob"),
            weight_dtype="model",
        ),
        hidden=config.size("moe_intermediate_size"),
        shared=SharedSpec(MLPSpec(config.size("shared_expert_intermediate_size")), gated=True),
    )
    dense = MLPSpec(config.size("intermediate_size"))
    dense_layers, step = config.take("mlp_only_layers", ()), config.size("decoder_sparse_step", MAX_LAYERS)
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=rope,
                bias=bias,
                window=window,
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
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        *common.shared_rules("mlp.shared_expert"),
        Rule("layers.{L}.shared.gate", LAYER + "mlp.shared_expert_gate.weight", "J D"),
    )


FAMILY = Family("qwen2_moe", _spec, _rules)
