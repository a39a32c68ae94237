"""gpt-oss (arXiv 2508.10925): windows on every other layer, a sink per head, biases everywhere, clamped experts."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    top_k = config.size("num_experts_per_tok")
    common.check_constants(config, {"experts_per_token": top_k})  # published configs say it twice
    config.expect("swiglu_alpha", 1.702)
    router = common.router(
        config,
        num_experts=config.size("num_local_experts"),
        renormalize=False,
        score="logits",
        softmax_dtype="model",
        bias=True,
    )
    activation = Activation("swiglu_clamped", config.number("swiglu_limit"))
    attention = common.attention(config, rope_spec(config), "attention_bias", sinks=True)
    return common.model_spec(
        config,
        common.windowed(config, attention),
        common.moe(config, router, "intermediate_size", activation=activation, bias=True),
        common.rms_norm(config, "rms_float32"),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    moe = LAYER + "mlp."
    return layouts.decoder_rules(
        spec,
        Rule("layers.{L}.router.weight", moe + "router.weight", "E D"),
        Rule("layers.{L}.router.bias", moe + "router.bias", "E"),
        Rule("layers.{L}.experts.gate_up", moe + "experts.gate_up_proj", "E D (F G)"),
        Rule("layers.{L}.experts.gate_up_bias", moe + "experts.gate_up_proj_bias", "E (F G)"),
        Rule("layers.{L}.experts.down", moe + "experts.down_proj", "E F D"),
        Rule("layers.{L}.experts.down_bias", moe + "experts.down_proj_bias", "E D"),
    )


def _other_limit(config: Mapping[str, Any]) -> str | None:
    """Of modeling_gpt_oss.py: ``self.limit = 7.0``."""
    limit = config.get("swiglu_limit", 7.0)
    if limit == 7.0:
        return None
    return (
        f"clamped experts at 7.0 whatever swiglu_limit says; read with swiglu_limit = {limit!r}, as 5.19 and later do. "
        "If it was trained with that version, set swiglu_limit to 7.0"
    )


FAMILY = Family(
    "gpt_oss",
    _spec,
    _rules,
    unused_fields=frozenset({"initial_context_length"}),
    mistakes=(Mistake((4, 55), (5, 19), _other_limit),),
)
