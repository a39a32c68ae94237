"""FlexOlmo (arXiv 2507.07024): OLMoE's routing in layers whose norms come after attention and experts."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import QKNorm
from jaxmoe.model.spec import ModelSpec

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    norm = common.rms_norm(config, "rms_float32")
    rope = rope_spec(config, float32=True)
    return common.model_spec(
        config,
        common.attention(config, rope, "attention_bias", qk_norm=QKNorm(norm, "full")),
        common.moe(config, common.router(config), "intermediate_size"),
        norm,
        layer={"placement": "post"},
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(),
        norms=_NORMS,
        attention=layouts.attention_rules(query_norm="Q", key_norm="U"),
    )


FAMILY = Family("flex_olmo", _spec, _rules)
