"""Laguna (Poolside, 2026): heads gated by a softplus, their number and their rotation by the kind of layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.bounds import MAX_SIZE
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec, rotation_of
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.spec import ModelSpec

# What transformers' model takes for it; anything else it would read as "per-element".
_PER_HEAD: Mapping[bool | str, bool] = {True: True, "per-head": True, "per-element": False}


def _unread(config: ConfigReader, per_head: bool) -> dict[str, Any]:
    """Fields of published configs and of the original code that transformers does not read, and what it computes."""
    ffns = common.mlp_types(config)
    return {
        "decoder_sparse_step": 1,
        "gating_types": ["per_head" if per_head else "per_element"] * len(ffns),
        "mlp_only_layers": [index for index, kind in enumerate(ffns) if kind == "dense"],
        "moe_router_use_sigmoid": True,
        "norm_topk_prob": True,
        "qkv_bias": config.take("attention_bias"),
        "swa_attention_sink_enabled": False,
    }


def _heads(config: ConfigReader) -> list[int]:
    """Query heads of every layer."""
    name = "num_attention_heads_per_layer"
    counts = config.take(name)
    if not all(isinstance(count, int) and 1 <= count <= MAX_SIZE for count in counts):
        raise UserError(f"{config.file}: {name} = {quote(counts)}: expected integers from 1 to {MAX_SIZE:,}")
    return list(counts)


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("gating", *_PER_HEAD)
    per_head = _PER_HEAD[config.take("gating")]
    common.check_constants(config, _unread(config, per_head))
    norm = common.rms_norm(config)

    def attention(window: int | None, num_heads: int) -> AttentionSpec:
        given = rotation_of(config, "full_attention" if window is None else "sliding_attention")
        mixer = common.attention(
            config,
            rope_spec(config, given, partial=True),
            "attention_bias",
            head_norm=norm,
            window=window,
            gated=not per_head,
            head_gated=per_head,
            gate_activation="softplus",
        )
        return dataclasses.replace(mixer, num_heads=num_heads)

    router = common.router(
        config,
        renormalize=True,
        score="sigmoid",
        correction="score",
        logit_softcap=config.number("moe_router_logit_softcapping", zero=True) or None,
        scale=config.number("moe_routed_scaling_factor"),
    )
    shared = common.shared_expert(config.size("shared_expert_intermediate_size"))
    return common.model_spec(
        config,
        list(map(attention, common.windows(config), _heads(config))),
        common.by_type(config, common.dense(config), common.moe(config, router, shared=shared)),
        norm,
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    mixers = [layer.mixer for layer in spec.layers]
    per_head = any(isinstance(mixer, AttentionSpec) and mixer.head_gated for mixer in mixers)
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *layouts.correction_rules("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        *layouts.shared_rules("mlp.shared_expert"),
        *layouts.shared_rules("mlp.shared_experts"),
        attention=layouts.attention_rules(gate="g_proj", gate_axes="N D" if per_head else "P D"),
    )


FAMILY = Family("laguna", _spec, _rules)
