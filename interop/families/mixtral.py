"""Mixtral (arXiv 2401.04088): every layer sparse, top-2 of 8, weights renormalised."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config)
    router = common.router(
        config,
        num_experts=config.size("num_local_experts"),
        renormalize=True,
        weight_dtype="float32",
        jitter=config.number("router_jitter_noise", 0.0, zero=True),
    )
    return common.model_spec(
        config,
        common.attention(config, rope_spec(config), window=config.take("sliding_window", None)),
        common.moe(config, router, "intermediate_size"),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(spec, *layouts.expert_rules("block_sparse_moe", ("w1", "w3", "w2")))


FAMILY = Family("mixtral", _spec, _rules)
