"""GLM-5 (arXiv 2602.15763): DeepSeek-V3.2's sparse attention, of which layers may share what they select."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, indexed, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(
        config,
        {
            "ep_size": 1,
            "indexer_rope_interleave": True,
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    )
    # What mlp_layer_types and indexer_types are made of where they are not there.
    for name in ("first_k_dense_replace", "index_skip_topk_offset", "index_topk_freq", "index_topk_pattern"):
        config.take(name, None)
    attention = indexed.sparse_attention(config, interleaved=True)
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    ffns = common.by_type(config, common.dense(config), sparse)
    return common.model_spec(config, indexed.by_indexer(config, attention), ffns, common.rms_norm(config))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    correction = layouts.correction_rules("mlp.gate.e_score_correction_bias")
    return latent.decoder_rules(spec, *indexed.indexer_rules(), *correction)


FAMILY = Family(
    "glm_moe_dsa",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    unused_fields=frozenset({"pretraining_tp"}),
)
