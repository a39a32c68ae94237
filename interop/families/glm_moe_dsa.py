"""GLM-5 (arXiv 2602.15763): sparse attention as in DeepSeek-V3.2; layers may share what is selected (2603.12201)."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, indexed
from jaxmoe.interop.families.family import Family
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


FAMILY = Family(
    "glm_moe_dsa",
    _spec,
    indexed.decoder_rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    unused_fields=frozenset({"pretraining_tp"}),
)
