"""Flint: windows with rope and full layers without, a sink per head, sigmoid routing beside a shared expert."""

from jaxmoe.interop.bounds import MAX_LAYERS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    norm = common.rms_norm(config, "rms_float32")
    attention = common.attention(config, rope_spec(config), "attention_bias", head_norm=norm, sinks=True)
    router = common.router(
        config, weight_dtype="float32", score="sigmoid", logits_dtype="float32", float32=True
    )
    shared = common.shared_expert(config.size("shared_expert_intermediate_size"))
    sparse = common.moe(config, router, shared=shared)
    step = config.size("decoder_sparse_step", MAX_LAYERS)
    return common.model_spec(
        config,
        common.windowed(config, attention, rotate_full=False),
        common.every_step(config, step, common.dense(config), sparse),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    sinks = Rule("layers.{L}.attention.sinks", LAYER + "self_attn.softmax_offset", "N")
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.shared_rules("mlp.shared_expert"),
        attention=(sinks, *layouts.attention_rules()),
    )


FAMILY = Family("flint", _spec, _rules)
