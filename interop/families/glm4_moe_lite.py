"""GLM-4.7-Flash: the attention and the router of DeepSeek-V3 (arXiv 2412.19437), and a list of what is dense."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(config, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    # Where it stands beside the list, transformers' model does not read it.
    config.expect("first_k_dense_replace", common.mlp_types(config).count("dense"), None)
    attention = latent.latent_attention(config, rope_spec(config, interleaved=config.take("rope_interleave")))
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    ffns = common.by_type(config, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, common.rms_norm(config))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return latent.decoder_rules(spec, *layouts.correction_rules("mlp.gate.e_score_correction_bias"))


FAMILY = Family(
    "glm4_moe_lite",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    unused_fields=frozenset({"pretraining_tp"}),
)
