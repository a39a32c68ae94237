"""Hy3 (Tencent, 2026): per-head norms, experts chosen by sigmoid plus a constant, weights renormalised and scaled."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "qk_norm": True,
    "route_norm": True,
}

# Token ids, kernels, and sums in float32 of what is rounded right after, which changes nothing.
_UNUSED = """
enable_attention_fp32_softmax enable_lm_head_fp32 enable_moe_fp32_combine eod_token_id sep_token_id use_grouped_mm
"""


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.expect("expert_hidden_dim", config.size("moe_intermediate_size"), None)
    config.expect("first_k_dense_replace", common.mlp_types(config).count("dense"), None)
    norm, mlp_bias = common.rms_norm(config), config.take("mlp_bias")
    router = common.router(
        config,
        renormalize=True,
        weight_dtype="float32",
        score="sigmoid",
        logits_dtype="float32",
        correction="score",
        sum_offset=1e-20,
        scale=config.number("router_scaling_factor"),
    )
    shared = common.shared_experts(config, "num_shared_experts", bias=mlp_bias)
    dense, sparse = common.dense(config, bias=mlp_bias), common.moe(config, router, shared=shared)
    return common.model_spec(
        config,
        common.attention(config, rope_spec(config), "attention_bias", head_norm=norm),
        common.by_type(config, dense, sparse),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(routers=("router.gate", "gate")),
        *layouts.correction_rules("mlp.expert_bias", "mlp.e_score_correction_bias"),
        *layouts.shared_rules("mlp.shared_mlp"),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "hy_v3",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers",),
    unused_fields=frozenset(_UNUSED.split()),
)
