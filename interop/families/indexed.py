"""What families with DeepSeek sparse attention share: its indexer, from a config.json, and its conversion rules."""

import dataclasses
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.bounds import MAX_POSITIONS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent
from jaxmoe.interop.families.layouts import LAYER, correction_rules
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.indexer import IndexerSpec
from jaxmoe.model.mixers.latent import LatentAttentionSpec
from jaxmoe.model.spec import ModelSpec


def sparse_attention(config: ConfigReader, *, interleaved: bool, **options: Any) -> LatentAttentionSpec:
    """Latent attention of the keys that an indexer selects.

    Args:
        config: of the model.
        interleaved: which features the indexer pairs to rotate them; attention pairs neighbours.
        options: further fields of the spec.
    """
    common.kinds(config, "layer_types", ("indexed_attention",))
    config.size("q_lora_rank")  # which other latent attention may do without
    rope = rope_spec(config, interleaved=True)
    return latent.latent_attention(
        config,
        rope,
        top_k=config.size("index_topk", MAX_POSITIONS),
        indexer=IndexerSpec(
            num_heads=config.size("index_n_heads"),
            head_dim=config.size("index_head_dim"),
            rope=dataclasses.replace(rope, interleaved=interleaved),
        ),
        **options,
    )


def by_indexer(config: ConfigReader, attention: LatentAttentionSpec) -> list[LatentAttentionSpec]:
    """`attention` in every layer that ``indexer_types`` calls full; in those called shared without an indexer."""
    types = common.kinds(config, "indexer_types", ("full", "shared"))
    if types[0] == "shared":
        raise UserError(
            f"{config.file}: indexer_types begin with 'shared': expected 'full', as no layer before has selected keys"
        )
    shared = dataclasses.replace(attention, indexer=None)
    return [attention if kind == "full" else shared for kind in types]


def decoder_rules(spec: ModelSpec) -> tuple[Rule, ...]:
    """A whole model: that of DeepSeek-V3, and its indexers."""

    def rule(target: str, source: str, axes: str) -> Rule:
        return Rule("layers.{L}.indexer." + target, LAYER + "self_attn.indexer." + source, axes)

    return latent.decoder_rules(
        spec,
        *correction_rules("mlp.gate.e_score_correction_bias"),
        rule("q_proj", "wq_b.weight", "H A"),
        rule("k_proj", "wk.weight", "H D"),
        rule("k_norm", "k_norm.weight", "H"),
        rule("k_norm_bias", "k_norm.bias", "H"),
        rule("head_weights", "weights_proj.weight", "J D"),
    )
