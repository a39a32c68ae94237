"""AFMoE (Arcee's Trinity): gated attention, windows with rope and full layers without, norms on both sides."""

import math

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
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}

# Published configs carry these though transformers' model has no code for them. At any other value the model
# would not be the one that its config describes.
_UNREAD = {
    "n_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "route_norm": True,
    "score_func": "sigmoid",
    "topk_group": 1,
}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    norm = NormSpec(config.number("rms_norm_eps"), "rms_float32")
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    rope = rope_spec(config, head_dim)
    hidden = config.size("moe_intermediate_size")
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=True,
            weight_dtype="float32",
            score="sigmoid",
            correction="score",
            sum_offset=1e-20,
            scale=config.number("route_scale"),
        ),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(hidden * config.size("num_shared_experts"))),
    )
    dense = MLPSpec(config.size("intermediate_size"))
    dense_layers = config.number("num_dense_layers", 0, zero=True)
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
                gated=True,
            ),
            dense if index < dense_layers else sparse,
            norm,
            placement="sandwich",
        )
        for index, window in enumerate(common.windows(config))
    ]
    scaled = config.take("mup_enabled", False)
    return common.model_spec(
        config, layers, norm, embedding_scale=math.sqrt(config.size("hidden_size")) if scaled else 1.0
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(_NORMS),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj"), router="router.gate"),
        *common.shared_rules("mlp.shared_experts"),
        common.correction_rule("mlp.expert_bias"),
    )


FAMILY = Family(
    "afmoe",
    _spec,
    _rules,
    unused_fields=frozenset(
        {"auto_map", "global_attn_every_n_layers", "load_balance_coeff", "use_grouped_mm"}
    ),
)
