"""Qwen2-MoE (arXiv 2407.10671): biases on queries, keys and values, a shared expert behind a gate of its own."""

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
    for name in ("use_sliding_window", "max_window_layers"):
        config.take(name)  # layer_types and sliding_window already say what follows from them
    attention = common.attention(config, rope_spec(config), bias=config.take("qkv_bias"))
    shared = common.shared_expert(config.size("shared_expert_intermediate_size"), gated=True)
    sparse = common.moe(config, common.router(config), shared=shared)
    step = config.size("decoder_sparse_step", MAX_LAYERS)
    return common.model_spec(
        config,
        common.windowed(config, attention),
        common.every_step(config, step, common.dense(config), sparse),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.shared_rules("mlp.shared_expert"),
        Rule("layers.{L}.shared.gate", LAYER + "mlp.shared_expert_gate.weight", "J D"),
    )


FAMILY = Family("qwen2_moe", _spec, _rules)
