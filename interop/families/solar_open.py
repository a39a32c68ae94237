"""Solar Open (Upstage, 2025): every layer sparse, DeepSeek-V3's router, one shared expert."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # transformers' model has no dense layers, and no norms of queries and keys.
    common.check_constants(config, {"first_k_dense_replace": 0, "use_qk_norm": False})
    rope, bias = rope_spec(config), config.take("attention_bias")
    shared = common.shared_experts(config, "n_shared_experts")
    return common.model_spec(
        config,
        common.attention(config, rope, bias=bias),
        common.moe(config, common.grouped_sigmoid_router(config), shared=shared),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(),
        *layouts.correction_rules("mlp.gate.e_score_correction_bias"),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "solar_open",
    _spec,
    _rules,
    # Of dense layers, which there are none.
    unused_fields=frozenset({"intermediate_size"}),
)
