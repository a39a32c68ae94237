"""LFM2-MoE (arXiv 2511.23404): gated short convolutions in most layers, attention in the others."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.mixers.short_convolution import ShortConvolutionSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec

_WORDS = ("w1", "w3", "w2")
_NORMS = {"attention_norm": "operator_norm", "ffn_norm": "ffn_norm"}


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("conv_bias", False)  # no published model has one
    norm = NormSpec(config.number("norm_eps"))
    mixers: dict[str, Mixer] = {
        "conv": ShortConvolutionSpec(config.size("hidden_size"), config.size("conv_L_cache")),
        "full_attention": common.attention(config, rope_spec(config), head_norm=norm),
    }
    types = common.kinds(config, "layer_types", tuple(mixers))
    router = common.router(
        config,
        score="sigmoid",
        correction="score" if config.take("use_expert_bias") else "none",
        sum_offset=1e-6,
        scale=config.number("routed_scaling_factor"),
    )
    sparse, dense_layers = common.moe(config, router), config.number("num_dense_layers", zero=True)
    ffns = common.by_index(config, lambda index: index < dense_layers, common.dense(config), sparse)
    return common.model_spec(config, [mixers[kind] for kind in types], ffns, norm)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    own, module = "layers.{L}.convolution.", LAYER + "conv."
    gate, up, down = _WORDS
    mlp = {"mlp.": "feed_forward.", "gate_proj|up_proj": f"{gate}|{up}", "down_proj": down}
    attention = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    return (
        *layouts.renamed(layouts.trunk_rules(spec.tie_embeddings), {"model.norm.": "model.embedding_norm."}),
        *layouts.norm_rules(_NORMS),
        *layouts.renamed(layouts.attention_rules(), attention),
        Rule(own + "filters", module + "conv.weight", "X J c"),
        Rule(own + "in_proj", module + "in_proj.weight", "X D"),
        Rule(own + "out_proj", module + "out_proj.weight", "D X"),
        *layouts.renamed(layouts.mlp_rules(), mlp),
        *layouts.renamed(layouts.expert_rules(words=_WORDS), {"mlp.": "feed_forward."}),
        *layouts.correction_rules("feed_forward.expert_bias"),
    )


FAMILY = Family("lfm2_moe", _spec, _rules, unused_fields=frozenset({"tie_embedding"}))
