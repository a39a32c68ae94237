"""ERNIE 4.5 (Baidu, 2025): experts chosen by softmax plus a constant, biases everywhere but in experts by config."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    config.expect("moe_gate", "topk", None)  # transformers' model knows no other
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim, bias = common.head_dim(config), config.take("use_bias")
    attention = AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim, whole=True, interleaved=True, float32=True),
        bias=bias,
        output_bias=bias,
    )
    hidden, shared = config.size("moe_intermediate_size"), config.take("moe_num_shared_experts")
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("moe_num_experts"),
            top_k=config.size("moe_k"),
            renormalize=True,
            weight_dtype="model",
            logits_dtype="float32",
            correction="score",
            least_sum=config.number("moe_norm_min", zero=True),
            float32=True,
        ),
        hidden=hidden,
        shared=SharedSpec(MLPSpec(hidden * shared, bias=bias)) if shared > 0 else None,
    )
    dense = MLPSpec(config.size("intermediate_size"), bias=bias)
    first, last = config.take("moe_layer_start_index"), config.take("moe_layer_end_index")
    interval = config.size("moe_layer_interval", MAX_LAYERS)
    layers = [
        LayerSpec(
            attention, sparse if first <= index <= last and (index + 1) % interval == 0 else dense, norm
        )
        for index in range(config.size("num_hidden_layers", MAX_LAYERS))
    ]
    return common.model_spec(config, layers, norm, head_bias=bias)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        Rule("lm_head_bias", "lm_head.bias", "V"),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.mlp_rules(),
        *common.expert_rules("mlp", ("gate_proj", "up_proj", "down_proj")),
        common.correction_rule("mlp.moe_statics.e_score_correction_bias", "() E"),
        *common.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "ernie4_5_moe",
    _spec,
    _rules,
    ignored=("mtp",),  # predict the token after the next
    unused_fields=frozenset({"moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers"}),
)
