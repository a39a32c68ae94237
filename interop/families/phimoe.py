"""Phi-3.5-MoE (arXiv 2404.14219): SparseMixer routing, LayerNorms and a head with biases.

Experts are chosen as in evaluation, also in training: SparseMixer's sampling of experts and its estimate of their
gradient (arXiv 2409.12136) are not done. Jitter on the input of a layer of experts is applied once. Beyond the original
context the long factors of the rotation are used, as the model was published, where transformers 5.23 keeps the short
ones.
"""

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader, is_positive
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _rope(config: ConfigReader, head_dim: int) -> RopeSpec:
    """Plain, or LongRoPE with the factor of cosines and sines that the config gives."""
    given = dict(config.take("rope_parameters"))
    config.take("original_max_position_embeddings", None)  # the config class has put it into rope_parameters
    short, long = given.pop("short_mscale", None), given.pop("long_mscale", None)
    if given.get("rope_type") == "default":
        return rope_spec(config, head_dim, given)
    if given.get("rope_type") != "longrope":
        raise UserError(
            f"{config.file}: rope type {given.get('rope_type')!r} is not supported; supported: default, longrope"
        )
    if short != long or not is_positive(short):
        raise UserError(
            f"{config.file}: short_mscale {short!r} and long_mscale {long!r} of the rotation: expected one positive "
            "number for both"
        )
    return rope_spec(config, head_dim, given | {"attention_factor": short})


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    config.expect("num_experts_per_tok", 2)  # SparseMixer's two rounds
    norm = NormSpec(config.number("rms_norm_eps"), "layer", bias=True)
    head_dim, bias = common.head_dim(config), config.take("attention_bias")
    layer = LayerSpec(
        AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=_rope(config, head_dim),
            bias=bias,
            output_bias=bias,
            window=config.take("sliding_window", None),
        ),
        MoESpec(
            router=RouterSpec(
                num_experts=config.size("num_local_experts"),
                top_k=2,
                renormalize=False,
                weight_dtype="model",
                score="sparsemixer",
                threshold=config.number("router_jitter_noise", zero=True),
                jitter=config.number("input_jitter_noise", zero=True),
            ),
            hidden=config.size("intermediate_size"),
        ),
        norm,
    )
    layers = [layer] * config.size("num_hidden_layers", MAX_LAYERS)
    return common.model_spec(config, layers, norm, head_bias=config.take("lm_head_bias"))


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    )


FAMILY = Family("phimoe", _spec, _rules, unused_fields=frozenset({"auto_map", "hidden_dropout"}))
