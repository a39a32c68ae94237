"""DeepSeek-V3 (arXiv 2412.19437), and Kimi K2 (arXiv 2507.20534): latent attention, sigmoid router with groups."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(
        config, {"ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    )
    attention = latent.latent_attention(config, rope_spec(config, interleaved=config.take("rope_interleave")))
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    first = config.take("first_k_dense_replace")
    ffns = common.by_index(config, lambda index: index < first, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, common.rms_norm(config))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return latent.decoder_rules(spec, *layouts.correction_rules("mlp.gate.e_score_correction_bias"))


FAMILY = Family(
    "deepseek_v3",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    # Of training from scratch: a balance loss per sequence and its factor.
    unused_fields=frozenset({"aux_loss_alpha", "pretraining_tp", "seq_aux"}),
    aliases=("kimi_k2",),
)
