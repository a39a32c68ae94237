"""Hy3 (Tencent, 2026): per-head norms, experts chosen by sigmoid plus a constant, weights renormalised and scaled."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "qk_norm": True,
    "route_norm": True,
}

# Token ids, kernels, and sums in float32 of what is rounded right after, which changes nothing.
_UNUSED = """
enable_attention_fp32_softmax enable_lm_head_fp32 enable_moe_fp32_combine eod_token_id num_nextn_predict_layers
sep_token_id use_grouped_mm
"""


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    for name, value in _UNREAD.items():
        config.expect(name, value, None)
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias, mlp_bias = common.head_dim(config), config.take("attention_bias"), config.take("mlp_bias")
    attention = AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim, whole=True),
        qk_norm=QKNorm(norm, "head"),
        bias=bias,
        output_bias=bias,
    )
    hidden = config.size("moe_intermediate_size")
    config.expect("expert_hidden_dim", hidden, None)
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=True,
            weight_dtype="float32",
            score="sigmoid",
            logits_dtype="float32",
            correction="score",
            sum_offset=1e-20,
            scale=config.number("router_scaling_factor"),
        ),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(hidden * config.size("num_shared_experts"), bias=mlp_bias)),
    )
    ffns: dict[str, MLPSpec | MoESpec] = {
        "dense": MLPSpec(config.size("intermediate_size"), bias=mlp_bias),
        "sparse": sparse,
    }
    types = common.kinds(config, "mlp_layer_types", ("dense", "sparse"))
    config.expect("first_k_dense_replace", types.count("dense"), None)
    return common.model_spec(config, [LayerSpec(attention, ffns[kind], norm) for kind in types], norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj"), router="router.gate"),
        common.correction_rule("mlp.expert_bias"),
        *common.shared_rules("mlp.shared_mlp"),
    )


FAMILY = Family(
    "hy_v3",
    _spec,
    _rules,
    ignored=(r"^model\.layers\.80\.",),  # predicts the token after the next
    unused_fields=frozenset(_UNUSED.split()),
)
