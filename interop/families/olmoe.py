"""OLMoE (arXiv 2409.02060): every layer sparse, query and key norms over the whole projection."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import QKNorm
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    norm = common.rms_norm(config)
    attention = common.attention(
        config,
        rope_spec(config),
        "attention_bias",
        qk_norm=QKNorm(norm, "full"),
        clip_qkv=None if config.take("clip_qkv", None) is None else config.number("clip_qkv"),
    )
    sparse = common.moe(config, common.router(config), "intermediate_size")
    return common.model_spec(config, attention, sparse, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(),
        attention=layouts.attention_rules(query_norm="Q", key_norm="U"),
    )


FAMILY = Family("olmoe", _spec, _rules)
