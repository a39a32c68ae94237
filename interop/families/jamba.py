"""Jamba (arXiv 2403.19887): Mamba in most layers, attention without rotation in the others, experts in every other."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.mamba1 import Mamba1Spec
from jaxmoe.model.spec import ModelSpec

# Of kernels and of generation.
_UNUSED = """
attention_dropout calc_logits_for_entire_prompt n_ctx num_logits_to_keep use_associative_scan use_mamba_kernels
use_mambapy
"""

_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"}


def _places(config: ConfigReader, layers: str) -> frozenset[int]:
    """Those of the layers called `layers`, one in each period."""
    period, offset = config.size(f"{layers}_period"), config.number(f"{layers}_offset", zero=True)
    return frozenset(index for index in range(common.depth(config)) if index % period == offset)


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, {"sliding_window": None})
    config.expect("mamba_proj_bias", False)  # no published model has one
    mamba = Mamba1Spec(
        channels=config.size("mamba_expand") * config.size("hidden_size"),
        state_size=config.size("mamba_d_state"),
        step_latent=config.size("mamba_dt_rank"),
        taps=config.size("mamba_d_conv"),
        norm=common.rms_norm(config),
        convolution_bias=config.take("mamba_conv_bias"),
    )
    attention, with_attention = common.attention(config, None), _places(config, "attn_layer")
    experts = config.size("num_experts")
    with_experts = _places(config, "expert_layer") if experts > 1 else frozenset()
    sparse = common.moe(config, common.router(config, renormalize=False), "intermediate_size")
    return common.model_spec(
        config,
        [attention if index in with_attention else mamba for index in range(common.depth(config))],
        common.by_index(config, lambda index: index not in with_experts, common.dense(config), sparse),
        common.rms_norm(config),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    own, module = "layers.{L}.mamba.", LAYER + "mamba."
    feed_forward = (*layouts.mlp_rules(), *layouts.expert_rules(routers=("router",)))
    return (
        *layouts.renamed(layouts.trunk_rules(spec.tie_embeddings), {"model.norm.": "model.final_layernorm."}),
        *layouts.norm_rules(_NORMS),
        *layouts.attention_rules(),
        Rule(own + "decay", module + "A_log", "X Y"),
        Rule(own + "skip", module + "D", "X"),
        Rule(own + "convolution", module + "conv1d.weight", "X J c"),
        Rule(own + "convolution_bias", module + "conv1d.bias", "X"),
        Rule(own + "in_proj", module + "in_proj.weight", "X D"),
        Rule(own + "x_proj", module + "x_proj.weight", "C X"),
        Rule(own + "step_proj", module + "dt_proj.weight", "X A"),
        Rule(own + "step_bias", module + "dt_proj.bias", "X"),
        Rule(own + "out_proj", module + "out_proj.weight", "D X"),
        Rule(own + "step_norm", module + "dt_layernorm.weight", "A"),
        Rule(own + "key_norm", module + "b_layernorm.weight", "Y"),
        Rule(own + "query_norm", module + "c_layernorm.weight", "Y"),
        *layouts.renamed(feed_forward, {"mlp.": "feed_forward."}),
    )


FAMILY = Family(
    "jamba", _spec, _rules, unused_fields=frozenset(_UNUSED.split()), sealed=frozenset({"dt_proj"})
)
