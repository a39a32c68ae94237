"""Ling 3 (inclusionAI, 2026): Kimi Delta Attention (arXiv 2510.26692) of bounded decay, latent attention with gates."""

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families import common, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.kimi_linear import delta_rules
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.channel_delta import ChannelDeltaSpec
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "expert_swiglu_limit_list": None,
    "gated_attention_proj_granularity_type": "head_wise",
    "linear_attention": "kda",
    "moe_router_enable_expert_bias": True,
    "no_kda_lora": True,
    "num_kv_heads_for_linear_attn": 0,
    "rope_interleave": True,
    "router_dtype": "fp32",
    "scale_router_input": False,
    "score_function": "sigmoid",
    "share_expert_swiglu_limit_list": None,
    "use_bias": False,
    "use_kda_lora": False,
    "use_mla_nope": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "value_norm": False,
}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("tie_word_embeddings", False)  # transformers' model never ties them
    of_widths = {
        "moe_shared_expert_intermediate_size": config.size("moe_intermediate_size"),
        "rotary_dim": config.size("qk_rope_head_dim"),
    }
    common.check_constants(config, _UNREAD | of_widths)
    for name in ("first_k_dense_replace", "layer_group_size", "rope_theta", "short_conv_kernel_size"):
        config.take(name, None)  # other fields say what follows from these
    lowest = config.take("kda_lower_bound")
    if isinstance(lowest, bool) or not isinstance(lowest, int | float) or not is_positive(-lowest):
        raise UserError(f"{config.file}: kda_lower_bound = {quote(lowest)}: expected a number below 0")
    delta = ChannelDeltaSpec(
        num_heads=config.size("linear_num_heads"),
        head_dim=config.size("linear_head_dim"),
        taps=config.size("linear_conv_kernel_dim"),
        norm=common.rms_norm(config, "rms_float32"),
        narrow_gates=False,
        least_log=lowest if config.take("kda_safe_gate") else None,
        float32=True,
    )
    attention = latent.latent_attention(config, rope_spec(config, interleaved=True), head_gated=True)
    mixers = {"linear_attention": delta, "full_attention": attention}
    router = common.grouped_sigmoid_router(config, "num_local_experts", float32=True)
    sparse = common.moe(config, router, shared=common.shared_experts(config, "n_shared_experts"))
    return common.model_spec(
        config,
        [mixers[kind] for kind in common.kinds(config, "layer_types", tuple(mixers))],
        common.by_type(config, common.dense(config), sparse),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    own, module = "layers.{L}.delta.", LAYER + "attention."
    return (
        Rule("embed", "model.word_embeddings.weight", "V D"),
        *layouts.decoder_rules(
            spec,
            *layouts.mlp_rules(),
            *layouts.expert_rules(),
            *layouts.correction_rules("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
            *layouts.shared_rules("mlp.shared_experts"),
            Rule(own + "o_proj", module + "o_proj.weight", "D P"),
            Rule(own + "o_proj", module + "dense.weight", "D P"),  # so transformers writes it
            Rule(own + "decay", module + "A_log", "N"),  # the first of its module there
            *delta_rules("attention", "N"),
            attention=(*latent.attention_rules("attention", "dense"), *latent.attention_rules()),
        ),
    )


FAMILY = Family(
    "bailing_hybrid",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    unused_fields=frozenset(
        {"group_norm_size", "max_window_layers", "mtp_loss_scaling_factor", "mtp_use_kda", "pretraining_tp"}
    ),
)
