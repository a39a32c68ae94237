"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router over grouped-query attention that rotates half of each head."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def text_spec(config: ConfigReader, qk_norm: bool, sections: bool = False) -> ModelSpec:
    """GLM-4.5, and the text model of GLM-4.5V.

    Args:
        config: of the text model.
        qk_norm: queries and keys are normed.
        sections: see `rope_spec`.
    """
    norm = common.rms_norm(config)
    attention = common.attention(
        config,
        rope_spec(config, sections=sections, partial=True),
        head_norm=norm if qk_norm else None,
        bias=config.take("attention_bias"),
    )
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    first = config.take("first_k_dense_replace")
    ffns = common.by_index(config, lambda index: index < first, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, norm)


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    return text_spec(config, config.take("use_qk_norm"))


def rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.correction_rules("mlp.gate.e_score_correction_bias"),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "glm4_moe",
    _spec,
    rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
)
