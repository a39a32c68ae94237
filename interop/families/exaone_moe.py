"""K-EXAONE (arXiv 2601.01739): windows with rope and full layers without, DeepSeek-V3's router."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

# Of published configs; transformers' model has no code for another value.
_UNREAD = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    kinds = common.kinds(config, "mlp_layer_types", ("dense", "sparse"))
    config.expect("is_moe_layer", [kind == "sparse" for kind in kinds], None)
    norm, head_dim = NormSpec(config.number("rms_norm_eps")), common.head_dim(config)
    rope = rope_spec(config, head_dim)
    hidden = config.size("moe_intermediate_size")
    ffns: dict[str, MLPSpec | MoESpec] = {
        "dense": MLPSpec(config.size("intermediate_size")),
        "sparse": MoESpec(
            router=common.grouped_sigmoid_router(config, "num_experts"),
            hidden=hidden,
            shared=SharedSpec(MLPSpec(hidden * config.size("num_shared_experts"))),
        ),
    }
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
            ffns[kind],
            norm,
        )
        for kind, window in zip(kinds, common.windows(config), strict=True)
    ]
    return common.model_spec(config, layers, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        *common.shared_rules("mlp.shared_experts"),
        common.correction_rule("mlp.e_score_correction_bias"),
    )


FAMILY = Family(
    "exaone_moe",
    _spec,
    _rules,
    ignored=(r"^mtp\.",),
    # layer_types and mlp_layer_types already say what follows from the first two.
    unused_fields=frozenset({"first_k_dense_replace", "sliding_window_pattern", "num_nextn_predict_layers"}),
)
