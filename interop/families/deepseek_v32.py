"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 with attention of the keys that an indexer selects."""

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
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    )
    config.take("first_k_dense_replace", None)  # what mlp_layer_types are made of where they are not there
    attention = indexed.sparse_attention(config, interleaved=False)
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, common.grouped_sigmoid_router(config), shared=shared)
    ffns = common.by_type(config, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, common.rms_norm(config))


FAMILY = Family(
    "deepseek_v32",
    _spec,
    indexed.decoder_rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    # Of training from scratch: a balance loss per sequence and its factor.
    unused_fields=frozenset({"aux_loss_alpha", "pretraining_tp", "seq_aux"}),
)
