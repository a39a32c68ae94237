"""A.X K2 (SK Telecom, 2026): DeepSeek-V3.2 (arXiv 2512.02556) with gates on attention and on norms."""

import dataclasses

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, indexed
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.spec import ModelSpec

_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this though transformers' model has no code for anything else.
    common.check_constants(
        config, {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    )
    # What mlp_layer_types is made of where it is not there.
    for name in ("first_k_dense_replace", "moe_layer_freq"):
        config.take(name, None)
    attention = indexed.sparse_attention(config, interleaved=False, query_gated=True)
    shared = common.shared_experts(config, "n_shared_experts")
    sparse = common.moe(config, _router(config), shared=shared)
    ffns = common.by_type(config, common.dense(config), sparse)
    norm = common.rms_norm(config)
    gated = dataclasses.replace(norm, gate=config.size("gated_norm_rank"))
    # A dense feed-forward has a norm without a gate.
    layers = [{"norms_before": (gated, gated if isinstance(ffn, MoESpec) else norm)} for ffn in ffns]
    return common.model_spec(config, attention, ffns, norm, layer=layers)


def _router(config: ConfigReader) -> RouterSpec:
    router = common.grouped_sigmoid_router(config)
    if router.groups is None:
        return router
    return dataclasses.replace(router, groups=dataclasses.replace(router.groups, masked=0.0))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    gates = (
        Rule(f"layers.{{L}}.{ours}.{part}", f"{LAYER}{theirs}.{source}.weight", axes)
        for ours, theirs in _NORMS.items()
        for part, axes, sources in (
            ("scale", "D", ("norm",)),
            ("in_proj", "A D", ("W_down", "mlp.fc1")),
            ("out_proj", "D A", ("W_up", "mlp.fc2")),
        )
        for source in sources
    )
    in_memory = Rule("layers.{L}.attention.q_b_proj", LAYER + "self_attn.q_gate_proj.weight", "Q A")
    return (*indexed.decoder_rules(spec), in_memory, *gates)


FAMILY = Family(
    "axk2",
    _spec,
    _rules,
    speculative=("num_nextn_predict_layers", "num_mtp_layers"),
    # Of training from scratch, and of running it.
    unused_fields=frozenset({"aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux"}),
)
