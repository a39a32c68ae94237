"""A.X K1 (arXiv 2601.09200): DeepSeek-V3 (arXiv 2412.19437) with a norm on what a layer's experts give."""

import dataclasses

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(config, {"scoring_func": "sigmoid"})
    # What mlp_layer_types is made of where it is not there.
    for name in ("first_k_dense_replace", "moe_layer_freq"):
        config.take(name, None)
    config.size("q_lora_rank")  # which other latent attention may do without
    attention = latent.latent_attention(config, rope_spec(config, interleaved=config.take("rope_interleave")))
    norm = common.rms_norm(config)
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, _router(config), shared=shared, norm=norm)
    ffns = common.by_type(config, common.dense(config), sparse)
    return common.model_spec(config, attention, ffns, norm)


def _router(config: ConfigReader) -> RouterSpec:
    router, method = common.grouped_sigmoid_router(config), config.take("topk_method", None)
    if isinstance(method, str) and method != "noaux_tc":
        # Folders of other methods hold no correction, and transformers' model goes on with zeros.
        return dataclasses.replace(router, correction="none")
    config.expect("topk_method", "noaux_tc", None)
    return router


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return latent.decoder_rules(
        spec,
        *layouts.correction_rules("mlp.gate.e_score_correction_bias"),
        Rule("layers.{L}.moe_norm", LAYER + "post_mlp_layernorm.weight", "D"),
        Rule("layers.{L}.moe_norm", LAYER + "mlp.post_mlp_layernorm.weight", "D"),
    )


FAMILY = Family(
    "axk1",
    _spec,
    _rules,
    # Published folders have one for each dense layer too, which neither uses; those of other layers have their rule.
    ignored=(r"^model\.layers\.\d+\.post_mlp_layernorm\.weight$",),
    speculative=("num_nextn_predict_layers",),
    # Of training from scratch, and of running it.
    unused_fields=frozenset({"aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux"}),
    aliases=("AXK1",),
)
