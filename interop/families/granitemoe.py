"""GraniteMoE (PowerMoE, arXiv 2408.13359): embedding, scores, residuals and logits each have a factor."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.spec import ModelSpec

UNUSED = frozenset({"attention_dropout"})

# transformers 4.53 to 5.0 wrote this; later models always rotate.
_UNREAD = {"position_embedding_type": "rope"}

STACKED = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
FUSED = ("router.weight", "experts.gate_up_proj", "experts.down_proj")


def attention(config: ConfigReader, rope: RopeSpec | None, **options: Any) -> AttentionSpec:
    """One layer's attention; `options` are further fields of the spec."""
    scale = config.number("attention_multiplier")
    return common.attention(config, rope, "attention_bias", scale=scale, **options)


def model(
    config: ConfigReader, mixers: Mixer | Sequence[Mixer], unread: Mapping[str, Any] = _UNREAD
) -> ModelSpec:
    """The model of these token mixers, with a shared expert where the config gives it a width.

    Args:
        config: of the model.
        mixers: of every layer, or one that all layers have.
        unread: see `common.check_constants`.
    """
    common.check_constants(config, unread)
    router = common.router(
        config, num_experts=config.size("num_local_experts"), renormalize=False, score="logits"
    )
    shared = None
    if config.take("shared_intermediate_size", 0):
        shared = common.shared_expert(config.size("shared_intermediate_size"))
    scales = (1.0, config.number("residual_multiplier"))
    return common.model_spec(
        config,
        mixers,
        common.moe(config, router, "intermediate_size", shared=shared),
        common.rms_norm(config),
        layer={"mixer_scales": scales, "ffn_scales": scales},
        embedding_scale=config.number("embedding_multiplier"),
        logit_scale=1 / config.number("logits_scaling"),
    )


def rules(spec: ModelSpec, names: Sequence[tuple[str, str, str]] = (STACKED, FUSED)) -> tuple[Rule, ...]:
    """Conversion rules, with those of a shared expert.

    Args:
        spec: the model.
        names: of router, gate and up, and down; those that a new checkpoint gets first.
    """
    experts, shared = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
    return layouts.decoder_rules(
        spec,
        *(Rule("layers.{L}.router.weight", experts + router, "E D") for router, _, _ in names),
        *(Rule("layers.{L}.experts.gate_up", experts + gate_up, "E (G F) D") for _, gate_up, _ in names),
        *(Rule("layers.{L}.experts.down", experts + down, "E D F") for _, _, down in names),
        Rule("layers.{L}.shared.gate_up", shared + "input_linear.weight", "(G I) D"),
        Rule("layers.{L}.shared.down", shared + "output_linear.weight", "D I"),
    )


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("shared_intermediate_size", 0, None)
    return model(config, attention(config, rope_spec(config)))


FAMILY = Family("granitemoe", _spec, rules, unused_fields=UNUSED)
