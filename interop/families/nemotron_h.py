"""Nemotron-H (arXiv 2504.03624) and Nemotron 3: Mamba 2, attention without rotation, experts or a dense feed-forward.

Each of these is a layer of its own. Experts have no gate, and may work in a latent width.
"""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family, Prefix
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.rules import Rule
from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import SharedSpec
from jaxmoe.model.mixers.mamba2 import Mamba2Spec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec

# Biases that no published model has; and what transformers' model does not read, whatever the config says.
_CONSTANTS = {
    "mamba_hidden_act": "silu",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "use_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "n_shared_experts": 1,
    "residual_in_fp32": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

# Of kernels, caches and new weights, and of layers that predict the token after the next.
_UNUSED = """
attention_dropout chunk_size expand hybrid_override_pattern mamba_ssm_cache_dtype moe_shared_expert_overlap
mtp_hybrid_override_pattern mtp_layers_block_type norm_eps num_logits_to_keep num_nextn_predict_layers
rescale_prenorm_residual time_step_floor time_step_limit time_step_max use_mamba_kernels
"""

_RELU2 = Activation("relu2")


def _mamba(config: ConfigReader, norm: NormSpec) -> Mamba2Spec:
    return Mamba2Spec(
        num_heads=config.size("mamba_num_heads"),
        num_groups=config.size("n_groups"),
        head_dim=config.size("mamba_head_dim"),
        state_size=config.size("ssm_state_size"),
        taps=config.size("conv_kernel"),
        norm=norm,
        convolution_bias=config.take("use_conv_bias"),
        least_step=config.number("time_step_min"),  # and time_step_limit is not read
    )


def _spec(config: ConfigReader) -> ModelSpec:
    for name, value in _CONSTANTS.items():
        config.expect(name, value)
    norm = NormSpec(config.number("layer_norm_epsilon"), "rms_float32")
    config.take("layers_block_type")  # the same as layer_types
    types = common.kinds(config, "layer_types", ("linear_attention", "full_attention", "moe", "mlp"))
    mixers: dict[str, Mixer] = {
        "linear_attention": _mamba(config, norm),
        "full_attention": common.attention(config, None),
    }
    shared = SharedSpec(MLPSpec(config.size("moe_shared_expert_intermediate_size"), _RELU2))
    latent = None if config.take("moe_latent_size", None) is None else config.size("moe_latent_size")
    sparse = common.moe(
        config, common.grouped_sigmoid_router(config), activation=_RELU2, shared=shared, latent=latent
    )
    ffns: dict[str, common.FeedForward] = {
        "moe": sparse,
        "mlp": MLPSpec(config.size("intermediate_size"), _RELU2),
    }
    return common.model_spec(
        config, [mixers.get(kind) for kind in types], [ffns.get(kind) for kind in types], norm
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    own, module = "layers.{L}.", LAYER + "mixer."
    trunk = layouts.trunk_rules(spec.tie_embeddings)
    return (
        *layouts.renamed(trunk, {"embed_tokens": "embeddings", "model.norm.": "model.norm_f."}),
        *layouts.norm_rules({"attention_norm": "norm", "ffn_norm": "norm"}),
        *layouts.mamba2_rules("mixer"),
        *layouts.renamed(layouts.attention_rules(), {"self_attn": "mixer"}),
        Rule(own + "mlp.gate_up", module + "{G:up_proj}.weight", "I D"),
        Rule(own + "mlp.down", module + "down_proj.weight", "D I"),
        Rule(own + "router.weight", module + "gate.weight", "E D"),
        *layouts.correction_rules("mixer.gate.e_score_correction_bias"),
        Rule(own + "experts.gate_up", module + "experts.{E}.{G:up_proj}.weight", "F D"),
        Rule(own + "experts.gate_up", module + "experts.up_proj", "E (G F) D"),
        Rule(own + "experts.down", module + "experts.{E}.down_proj.weight", "D F"),
        Rule(own + "experts.down", module + "experts.down_proj", "E D F"),
        Rule(own + "latent.in_proj", module + "fc1_latent_proj.weight", "C D"),
        Rule(own + "latent.out_proj", module + "fc2_latent_proj.weight", "D C"),
        Rule(own + "shared.gate_up", module + "shared_experts.{G:up_proj}.weight", "I D"),
        Rule(own + "shared.down", module + "shared_experts.down_proj.weight", "D I"),
    )


FAMILY = Family(
    "nemotron_h",
    _spec,
    _rules,
    ignored=(r"^mtp\.",),
    unused_fields=frozenset(_UNUSED.split()),
    prefixes=(Prefix("backbone."), Prefix()),
    sealed=frozenset({"out_proj"}),
)
