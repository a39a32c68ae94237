"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router over attention with per-head norms and, by config, windows."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.take("max_window_layers", None)  # layer_types already says what follows from it
    norm = common.rms_norm(config)
    attention = common.attention(config, rope_spec(config), "attention_bias", head_norm=norm)
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    first = config.take("first_k_dense_replace")
    return common.model_spec(
        config,
        common.windowed(config, attention),
        common.by_index(config, lambda index: index < first, common.dense(config), sparse),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.correction_rules("mlp.gate.e_score_correction_bias"),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "dots1",
    _spec,
    _rules,
    unused_fields=frozenset({"aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux"}),
)
