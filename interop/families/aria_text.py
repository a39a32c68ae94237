"""Aria's text model (arXiv 2410.05993): weights are a softmax over the chosen, shared experts, matrices transposed."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Older configs had moe_intermediate_size for experts.
    common.check_constants(config, {"moe_intermediate_size": config.size("intermediate_size")})
    router = common.router(
        config,
        num_experts=config.size("moe_num_experts"),
        top_k=config.size("moe_topk"),
        renormalize=False,
        score="logits",
        softmax_dtype="model",
    )
    shared = common.shared_experts(
        config, "moe_num_shared_experts", "intermediate_size", bias=config.take("mlp_bias")
    )
    return common.model_spec(
        config,
        common.attention(config, rope_spec(config), "attention_bias"),
        common.moe(config, router, "intermediate_size", shared=shared),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.shared_rules("mlp.shared_experts"),
        Rule("layers.{L}.router.weight", LAYER + "mlp.router.weight", "E D"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.fc1.weight", "E D (G F)"),
        Rule("layers.{L}.experts.gate_up", LAYER + "mlp.experts.gate_up_proj", "E D (G F)"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.fc2.weight", "E F D"),
        Rule("layers.{L}.experts.down", LAYER + "mlp.experts.down_proj", "E F D"),
    )


FAMILY = Family(
    "aria_text", _spec, _rules, unused_fields=frozenset({"num_experts_per_tok", "pretraining_tp"})
)
