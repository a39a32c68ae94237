"""AFMoE (Arcee's Trinity): gated attention, windows with rope and full layers without, norms on both sides."""

import math

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

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
    common.check_constants(config, _UNREAD)
    norm = common.rms_norm(config, "rms_float32")
    attention = common.attention(config, rope_spec(config), "attention_bias", head_norm=norm, gated=True)
    router = common.router(
        config,
        renormalize=True,
        weight_dtype="float32",
        score="sigmoid",
        correction="score",
        sum_offset=1e-20,
        scale=config.number("route_scale"),
    )
    sparse = common.moe(config, router, shared=common.shared_experts(config, "num_shared_experts"))
    dense_layers = config.number("num_dense_layers", 0, zero=True)
    return common.model_spec(
        config,
        common.windowed(config, attention, rotate_full=False),
        common.by_index(config, lambda index: index < dense_layers, common.dense(config), sparse),
        norm,
        layer={"placement": "sandwich"},
        embedding_scale=math.sqrt(config.size("hidden_size")) if config.take("mup_enabled", False) else 1.0,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(routers=("router.gate",)),
        *layouts.shared_rules("mlp.shared_experts"),
        *layouts.correction_rules("mlp.expert_bias"),
        norms=_NORMS,
    )


FAMILY = Family(
    "afmoe",
    _spec,
    _rules,
    unused_fields=frozenset(
        {"auto_map", "global_attn_every_n_layers", "load_balance_coeff", "use_grouped_mm"}
    ),
)
