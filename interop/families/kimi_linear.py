"""Kimi Linear (arXiv 2510.26692): Kimi Delta Attention in most layers, latent attention without rotation elsewhere."""

from jaxmoe.errors import UserError, listed, quote
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, latent, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.channel_delta import ChannelDeltaSpec
from jaxmoe.model.spec import ModelSpec

# Published configs say these of the original code; transformers' model has no other way.
_UNREAD = {
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "num_nextn_predict_layers": 0,
    "topk_method": "noaux_tc",
    "use_grouped_topk": True,
}

# What transformers' config class makes other fields of.
_LINEAR = frozenset({"full_attn_layers", "head_dim", "kda_layers", "num_heads", "short_conv_kernel_size"})


def _spec(config: ConfigReader) -> ModelSpec:
    common.check_constants(config, _UNREAD)
    config.expect("tie_word_embeddings", False)  # transformers' model never ties them
    config.take("first_k_dense_replace", None)  # mlp_layer_types say what follows from it
    given = config.take("linear_attn_config", None) or {}
    unknown = sorted(set(given) - _LINEAR)
    if unknown:
        raise UserError(
            f"{config.file}: linear_attn_config has unknown entries {listed(list(map(quote, unknown)), 8)}: expected "
            f"none but {', '.join(sorted(_LINEAR))}"
        )
    delta = ChannelDeltaSpec(
        num_heads=config.size("linear_num_heads"),
        head_dim=config.size("linear_head_dim"),
        taps=config.size("linear_conv_kernel_dim"),
        norm=common.rms_norm(config, "rms_float32"),
    )
    mixers = {"linear_attention": delta, "full_attention": latent.latent_attention(config, None)}
    router = common.grouped_sigmoid_router(config, "num_local_experts", float32=True)
    sparse = common.moe(config, router, shared=common.shared_experts(config, "n_shared_experts"))
    return common.model_spec(
        config,
        [mixers[kind] for kind in common.kinds(config, "layer_types", tuple(mixers))],
        common.by_type(config, common.dense(config), sparse),
        common.rms_norm(config),
    )


def delta_rules(module: str, decay: str) -> tuple[Rule, ...]:
    """Kimi Delta Attention, as folders have it and as transformers holds it in memory.

    Args:
        module: that holds it in folders.
        decay: axes of ``A_log``.
    """
    own = "layers.{L}.delta."
    plain = {"q": "Q D", "k": "U D", "v": "P D", "b": "N D", "o": "D P"}
    plain |= {"g_a": "A D", "g_b": "P A", "g": "P D"}
    forgetting = {"f_a": "A D", "f_b": "Q A", "f": "Q D"}
    layouts = (
        (f"{LAYER}{module}.", "", "{X/q_conv1d|k_conv1d|v_conv1d}"),
        (f"{LAYER}self_attn.", "forget_gate.", "conv1d"),
    )
    return tuple(
        rule
        for place, gate, convolution in layouts
        for rule in (
            *(Rule(f"{own}{name}_proj", f"{place}{name}_proj.weight", axes) for name, axes in plain.items()),
            *(
                Rule(f"{own}{name}_proj", f"{place}{gate}{name}_proj.weight", axes)
                for name, axes in forgetting.items()
            ),
            Rule(own + "step_bias", f"{place}{gate}dt_bias", "Q"),
            Rule(own + "decay", f"{place}{gate}A_log", decay),
            Rule(own + "norm", f"{place}o_norm.weight", "H"),
            Rule(own + "convolution", f"{place}{convolution}.weight", "X J c"),
        )
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    block = "block_sparse_moe"
    dense = layouts.mlp_rules()
    return layouts.decoder_rules(
        spec,
        *layouts.expert_rules(block, ("w1", "w3", "w2")),
        *layouts.correction_rules(*(f"{name}.gate.e_score_correction_bias" for name in (block, "mlp"))),
        *(rule for name in (block, "mlp") for rule in layouts.shared_rules(f"{name}.shared_experts")),
        # Published, written by transformers, and in its memory.
        *dense,
        *layouts.mlp_rules(block),
        *dense,
        *delta_rules("self_attn", "() () N ()"),
        attention=latent.attention_rules(),
    )


FAMILY = Family("kimi_linear", _spec, _rules)
