"""K-EXAONE (arXiv 2601.01739): windows with rope and full layers without, DeepSeek-V3's router."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Of published configs; transformers' model has no code for another value.
_UNREAD = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.expect("is_moe_layer", [kind == "sparse" for kind in common.mlp_types(config)], None)
    norm = common.rms_norm(config)
    attention = common.attention(config, rope_spec(config), head_norm=norm)
    router = common.grouped_sigmoid_router(config, "num_experts")
    sparse = common.moe(config, router, shared=common.shared_experts(config, "num_shared_experts"))
    return common.model_spec(
        config,
        common.windowed(config, attention, rotate_full=False),
        common.by_type(config, common.dense(config), sparse),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.shared_rules("mlp.shared_experts"),
        *layouts.correction_rules("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
    )


FAMILY = Family(
    "exaone_moe",
    _spec,
    _rules,
    ignored=(r"^mtp\.",),
    # layer_types and mlp_layer_types already say what follows from the first two.
    unused_fields=frozenset({"first_k_dense_replace", "sliding_window_pattern", "num_nextn_predict_layers"}),
)
