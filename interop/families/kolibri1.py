"""Kolibri-1: windows with rope and full layers without, norms on both sides, experts chosen by biased logits."""

from jaxmoe.interop.bounds import MAX_POSITIONS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attn_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_ffn_norm",
}
_IN_MEMORY = {"attention_post_norm": "post_self_attn_layernorm", "ffn_post_norm": "post_mlp_layernorm"}


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    config.size("sliding_window", MAX_POSITIONS)  # without one transformers' model does not run
    norm = common.rms_norm(config)
    router = common.router(
        config, weight_dtype="float32", score="sigmoid", logits_dtype="float32", correction="logit"
    )
    shared = common.shared_expert(config.size("shared_expert_intermediate_size"))
    attention = common.attention(config, rope_spec(config), head_norm=norm)
    return common.model_spec(
        config,
        common.windowed(config, attention, rotate_full=False),
        common.moe(config, router, shared=shared),
        norm,
        layer={"placement": "sandwich"},
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(),
        *layouts.shared_rules("mlp.shared_experts"),
        *layouts.correction_rules("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        *layouts.norm_rules(_IN_MEMORY),
        norms=_NORMS,
    )


FAMILY = Family("kolibri1", _spec, _rules)
