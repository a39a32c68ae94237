"""ERNIE 4.5 (Baidu, 2025): experts chosen by softmax plus a constant, biases everywhere but in experts by config."""

from jaxmoe.interop.bounds import MAX_LAYERS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, {"moe_gate": "topk"})
    bias, shared = config.take("use_bias"), config.take("moe_num_shared_experts")
    router = common.router(
        config,
        num_experts=config.size("moe_num_experts"),
        top_k=config.size("moe_k"),
        renormalize=True,
        logits_dtype="float32",
        correction="score",
        least_sum=config.number("moe_norm_min", zero=True),
        float32=True,
    )
    width = config.size("moe_intermediate_size") * shared
    sparse = common.moe(config, router, shared=common.shared_expert(width, bias) if shared > 0 else None)
    first, last = config.take("moe_layer_start_index"), config.take("moe_layer_end_index")
    interval = config.size("moe_layer_interval", MAX_LAYERS)

    def is_dense(index: int) -> bool:
        return not (first <= index <= last and (index + 1) % interval == 0)

    return common.model_spec(
        config,
        common.attention(config, rope_spec(config, interleaved=True, float32=True), "use_bias"),
        common.by_index(config, is_dense, common.dense(config, bias=bias), sparse),
        common.rms_norm(config),
        head_bias=bias,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.correction_rules(
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
            axes="() E",
        ),
        *layouts.shared_rules("mlp.shared_experts"),
    )


FAMILY = Family(
    "ernie4_5_moe",
    _spec,
    _rules,
    ignored=("mtp",),  # predict the token after the next
    unused_fields=frozenset({"moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers"}),
)
