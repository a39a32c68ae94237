"""Cohere2-MoE (Command A+): attention beside the feed-forward, windows with rope and full layers without."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _norm(config: ConfigReader) -> NormSpec:
    layer = NormSpec(config.number("layer_norm_eps"), "layer")
    return layer if config.take("rms_norm_eps", None) is None else NormSpec(config.number("rms_norm_eps"))


def _experts(config: ConfigReader) -> MoESpec:
    """Chosen by their logits; weighed by a softmax of the chosen ones, or by a sigmoid each."""
    config.expect("expert_selection_fn", "softmax", "sigmoid")
    config.expect("shared_expert_combination_strategy", "sum", "average")
    sigmoid, renormalize = config.take("expert_selection_fn") == "sigmoid", config.take("norm_topk_prob")
    hidden = config.size("intermediate_size")
    shared = hidden * config.size("num_shared_experts") if config.take("num_shared_experts") else 0
    averaged = config.take("shared_expert_combination_strategy") == "average"
    return MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=sigmoid and renormalize,
            weight_dtype="model",
            score="sigmoid" if sigmoid else "logits",
        ),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(shared), averaged=averaged) if shared else None,
    )


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm, head_dim, bias = _norm(config), common.head_dim(config), config.take("attention_bias")
    rope = rope_spec(config, head_dim, interleaved=True, float32=True)
    kinds = common.kinds(config, "mlp_layer_types", ("dense", "sparse"))
    prefix = config.take("prefix_dense_intermediate_size", None)
    ffns: dict[str, MLPSpec | MoESpec] = {
        "dense": MLPSpec(
            config.size("intermediate_size" if prefix is None else "prefix_dense_intermediate_size")
        ),
        "sparse": _experts(config),
    }
    dense_turns = config.take("prefix_dense_sliding_window_pattern") == 1
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=config.size("num_attention_heads"),
                num_kv_heads=config.size("num_key_value_heads"),
                head_dim=head_dim,
                rope=rope if window is not None or (kind == "dense" and dense_turns) else None,
                bias=bias,
                output_bias=bias,
                window=window,
            ),
            ffns[kind],
            norm,
            placement="parallel",
        )
        for kind, window in zip(kinds, common.windows(config), strict=True)
    ]
    return common.model_spec(config, layers, norm, logit_scale=config.number("logit_scale"))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        *common.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "cohere2_moe",
    _spec,
    _rules,
    # layer_types and mlp_layer_types already say what follows from them.
    unused_fields=frozenset({"first_k_dense_replace", "sliding_window_pattern"}),
)
