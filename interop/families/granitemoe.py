"""GraniteMoE (PowerMoE, arXiv 2408.13359): embedding, scores, residuals and logits each have a factor."""

from collections.abc import Sequence
from typing import Any

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.common import LAYER
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec

UNUSED = frozenset({"attention_dropout"})

STACKED = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
FUSED = ("router.weight", "experts.gate_up_proj", "experts.down_proj")


def attention(config: ConfigReader, rope: RopeSpec | None, **options: Any) -> AttentionSpec:
    """One layer's attention; `options` are further fields of the spec."""
    bias = config.take("attention_bias")
    return AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=common.head_dim(config),
        rope=rope,
        bias=bias,
        output_bias=bias,
        scale=config.number("attention_multiplier"),
        **options,
    )


def model(config: ConfigReader, mixers: Sequence[AttentionSpec]) -> ModelSpec:
    """The model of these token mixers, with a shared expert where the config gives it a width."""
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"))
    shared = config.size("shared_intermediate_size") if config.take("shared_intermediate_size", 0) else 0
    sparse = MoESpec(
        router=RouterSpec(
            num_experts=config.size("num_local_experts"),
            top_k=config.size("num_experts_per_tok"),
            renormalize=False,
            weight_dtype="model",
            score="logits",
        ),
        hidden=config.size("intermediate_size"),
        shared=SharedSpec(MLPSpec(shared)) if shared else None,
    )
    residual_scale = config.number("residual_multiplier")
    return common.model_spec(
        config,
        [LayerSpec(mixer, sparse, norm, residual_scale=residual_scale) for mixer in mixers],
        norm,
        embedding_scale=config.number("embedding_multiplier"),
        logit_scale=1 / config.number("logits_scaling"),
    )


def plain_attention(config: ConfigReader) -> list[AttentionSpec]:
    """The same attention in every layer."""
    rope = rope_spec(config, common.head_dim(config))
    return [attention(config, rope)] * config.size("num_hidden_layers", MAX_LAYERS)


def rules(spec: ModelSpec, layouts: Sequence[tuple[str, str, str]] = (STACKED, FUSED)) -> tuple[Rule, ...]:
    """Conversion rules, with those of a shared expert.

    Args:
        spec: the model.
        layouts: names of router, gate and up, and down; those that a new checkpoint gets first.
    """
    experts, shared = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *(Rule("layers.{L}.router.weight", experts + router, "E D") for router, _, _ in layouts),
        *(Rule("layers.{L}.experts.gate_up", experts + gate_up, "E (G F) D") for _, gate_up, _ in layouts),
        *(Rule("layers.{L}.experts.down", experts + down, "E D F") for _, _, down in layouts),
        Rule("layers.{L}.shared.gate_up", shared + "input_linear.weight", "(G I) D"),
        Rule("layers.{L}.shared.down", shared + "output_linear.weight", "D I"),
    )


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("shared_intermediate_size", 0, None)
    return model(config, plain_attention(config))


FAMILY = Family("granitemoe", _spec, rules, unused_fields=UNUSED)
