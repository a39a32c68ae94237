"""Qwen3-MoE (arXiv 2505.09388): per-head query and key norms; dense layers among sparse ones by config."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

# Published configs (Qwen3-Coder) carry these though transformers' model has no code for them. At any other
# value the model would not be the one that its config describes.
_UNREAD = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim = common.head_dim(config)
    bias = config.take("attention_bias")
    windowed = config.take("use_sliding_window")
    window = config.take("sliding_window", None)
    attention = AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim),
        qk_norm=QKNorm(norm, "head"),
        bias=bias,
        output_bias=bias,
        window=window if windowed else None,
    )
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=config.take("norm_topk_prob"),
            weight_dtype="model",
        ),
        hidden=config.size("moe_intermediate_size"),
    )
    dense = MLPSpec(config.size("intermediate_size"))
    dense_layers, step = config.take("mlp_only_layers", ()), config.size("decoder_sparse_step")
    layers = [
        LayerSpec(attention, dense if index in dense_layers or (index + 1) % step else sparse, norm)
        for index in range(config.size("num_hidden_layers", MAX_LAYERS))
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
    )


FAMILY = Family("qwen3_moe", _spec, _rules, unused_fields=frozenset({"max_window_layers"}))
