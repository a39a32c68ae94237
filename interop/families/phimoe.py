"""Phi-3.5-MoE (arXiv 2404.14219): SparseMixer routing, LayerNorms and a head with biases.

Experts are chosen as in evaluation, also in training: SparseMixer's sampling of experts and its estimate of their
gradient (arXiv 2409.12136) are not done. Jitter on the input of a layer of experts is applied once. Beyond the original
context the long factors of the rotation are used, as the model was published, where transformers 5.23 keeps the short
ones.
"""

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec


def _rope(config: ConfigReader) -> RopeSpec:
    """Plain, or LongRoPE with the factor of cosines and sines that the config gives."""
    given = dict(config.take("rope_parameters"))
    config.take("original_max_position_embeddings", None)  # the config class has put it into rope_parameters
    short, long = given.pop("short_mscale", None), given.pop("long_mscale", None)
    if given.get("rope_type") == "default":
        return rope_spec(config, given)
    if given.get("rope_type") != "longrope":
        raise UserError(
            f"{config.file}: rope type {quote(given.get('rope_type'))} is not supported; supported: default, longrope"
        )
    if short != long or not is_positive(short):
        raise UserError(
            f"{config.file}: short_mscale {quote(short)} and long_mscale {quote(long)} of the rotation: expected one "
            "positive number for both"
        )
    return rope_spec(config, given | {"attention_factor": short})


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    config.expect("num_experts_per_tok", 2)  # SparseMixer's two rounds
    router = common.router(
        config,
        num_experts=config.size("num_local_experts"),
        renormalize=False,
        score="sparsemixer",
        threshold=config.number("router_jitter_noise", zero=True),
        jitter=config.number("input_jitter_noise", zero=True),
    )
    window = config.take("sliding_window", None)
    return common.model_spec(
        config,
        common.attention(config, _rope(config), "attention_bias", window=window),
        common.moe(config, router, "intermediate_size"),
        NormSpec(config.number("rms_norm_eps"), "layer", bias=True),
        head_bias=config.take("lm_head_bias"),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec, *layouts.expert_rules("block_sparse_moe", ("w1", "w3", "w2"), ("gate", "router"))
    )


FAMILY = Family("phimoe", _spec, _rules, unused_fields=frozenset({"auto_map", "hidden_dropout"}))
