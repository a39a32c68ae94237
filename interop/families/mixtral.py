"""Mixtral (arXiv 2401.04088): every layer sparse, top-2 of 8, weights renormalised."""

from jaxmoe.interop.config_json import MAX_LAYERS, ConfigReader
from jaxmoe.interop.families import common
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.feed_forward.router import RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("hidden_act", "silu")
    norm = NormSpec(config.number("rms_norm_eps"))
    head_dim = common.head_dim(config)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=config.size("num_attention_heads"),
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            rope=rope_spec(config, head_dim),
            window=config.take("sliding_window", None),
        ),
        ffn=MoESpec(
            router=RouterSpec(
                num_experts=config.size("num_local_experts"),
                top_k=config.size("num_experts_per_tok"),
                renormalize=True,
                weight_dtype="float32",
                jitter=config.number("router_jitter_noise", 0.0, zero=True),
            ),
            hidden=config.size("intermediate_size"),
        ),
        norm=norm,
    )
    return common.model_spec(config, [layer] * config.size("num_hidden_layers", MAX_LAYERS), norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        *common.trunk_rules(spec.tie_embeddings),
        *common.norm_rules(),
        *common.attention_rules(),
        *common.expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    )


FAMILY = Family("mixtral", _spec, _rules, ignored=(r"\.rotary_emb\.inv_freq$",))
