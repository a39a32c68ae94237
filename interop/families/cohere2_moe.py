"""Cohere2-MoE (Command A+): attention beside the feed-forward, windows with rope and full layers without."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec


def _norm(config: ConfigReader) -> NormSpec:
    layer = NormSpec(config.number("layer_norm_eps"), "layer")
    return layer if config.take("rms_norm_eps", None) is None else common.rms_norm(config)


def _experts(config: ConfigReader) -> MoESpec:
    """Chosen by their logits; weighed by a softmax of the chosen ones, or by a sigmoid each."""
    config.expect("expert_selection_fn", "softmax", "sigmoid")
    config.expect("shared_expert_combination_strategy", "sum", "average")
    sigmoid, renormalize = config.take("expert_selection_fn") == "sigmoid", config.take("norm_topk_prob")
    router = common.router(
        config, renormalize=sigmoid and renormalize, score="sigmoid" if sigmoid else "logits"
    )
    shared = None
    if config.take("num_shared_experts"):
        averaged = config.take("shared_expert_combination_strategy") == "average"
        hidden = config.size("intermediate_size") * config.size("num_shared_experts")
        shared = common.shared_expert(hidden, averaged=averaged)
    return common.moe(config, router, "intermediate_size", shared=shared)


def _attention(config: ConfigReader) -> list[AttentionSpec]:
    """Layers with a window have a rotation, and by config those whose feed-forward is dense."""
    rope = rope_spec(config, interleaved=True, float32=True)
    dense_turns = config.take("prefix_dense_sliding_window_pattern") == 1
    return [
        common.attention(
            config,
            rope if window is not None or (kind == "dense" and dense_turns) else None,
            "attention_bias",
            window=window,
        )
        for window, kind in zip(common.windows(config), common.mlp_types(config), strict=True)
    ]


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    prefix = config.take("prefix_dense_intermediate_size", None)
    dense = common.dense(config, "intermediate_size" if prefix is None else "prefix_dense_intermediate_size")
    return common.model_spec(
        config,
        _attention(config),
        common.by_type(config, dense, _experts(config)),
        _norm(config),
        layer={"placement": "parallel"},
        logit_scale=config.number("logit_scale"),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "cohere2_moe",
    _spec,
    _rules,
    # layer_types and mlp_layer_types already say what follows from them.
    unused_fields=frozenset({"first_k_dense_replace", "sliding_window_pattern"}),
)
