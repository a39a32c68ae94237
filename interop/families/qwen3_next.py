"""Qwen3-Next: Gated DeltaNet (arXiv 2412.06464) in most layers, gated attention (arXiv 2505.06708) in the others."""

from typing import Any

from jaxmoe.interop.bounds import MAX_LAYERS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.layouts import LAYER
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.feed_forward.moe import SharedSpec
from jaxmoe.model.mixers.gated_delta import GatedDeltaSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import ModelSpec


def mixers(config: ConfigReader, norm: NormSpec, by_key_head: bool, **rotation: Any) -> list[Mixer]:
    """The token mixer of every layer, as ``layer_types`` says.

    Args:
        config: of the model.
        norm: of the layers, and of queries and keys.
        by_key_head: how Gated DeltaNet's projections are laid out.
        rotation: options of `rope_spec`.
    """
    rope = rope_spec(config, partial=True, **rotation)
    attention = common.attention(config, rope, "attention_bias", head_norm=norm, query_gated=True)
    delta = GatedDeltaSpec(
        num_heads=config.size("linear_num_value_heads"),
        num_key_heads=config.size("linear_num_key_heads"),
        key_dim=config.size("linear_key_head_dim"),
        value_dim=config.size("linear_value_head_dim"),
        taps=config.size("linear_conv_kernel_dim"),
        norm=common.rms_norm(config),
        by_key_head=by_key_head,
    )
    types = common.kinds(config, "layer_types", ("linear_attention", "full_attention"))
    return [delta if kind == "linear_attention" else attention for kind in types]


def shared(config: ConfigReader) -> SharedSpec:
    """The expert of every token, behind a gate."""
    return common.shared_expert(config.size("shared_expert_intermediate_size"), gated=True)


def _spec(config: ConfigReader) -> ModelSpec:
    # Published configs say this, and transformers' model has no windows.
    common.check_constants(config, {"use_sliding_window": False})
    config.take("full_attention_interval", None)  # layer_types say what follows from it
    norm = common.rms_norm(config, "rms_centred")
    sparse = common.moe(config, common.router(config), shared=shared(config))
    step = config.size("decoder_sparse_step", MAX_LAYERS)
    return common.model_spec(
        config,
        mixers(config, norm, by_key_head=True),
        common.every_step(config, step, common.dense(config), sparse),
        norm,
    )


def delta_rules(*projections: tuple[str, str]) -> tuple[Rule, ...]:
    """Gated DeltaNet, with its input projections and their axes."""
    own, module = "layers.{L}.delta.", LAYER + "linear_attn."
    return (
        Rule(own + "step_bias", module + "dt_bias", "N"),
        Rule(own + "decay", module + "A_log", "N"),
        Rule(own + "convolution", module + "conv1d.weight", "X J c"),
        *(Rule(own + name, f"{module}{name}.weight", axes) for name, axes in projections),
        Rule(own + "norm", module + "norm.weight", "H"),
        Rule(own + "out_proj", module + "out_proj.weight", "D P"),
    )


def shared_rules() -> tuple[Rule, ...]:
    """The shared expert and its gate."""
    return (
        *layouts.shared_rules("mlp.shared_expert"),
        Rule("layers.{L}.shared.gate", LAYER + "mlp.shared_expert_gate.weight", "J D"),
    )


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return layouts.decoder_rules(
        spec,
        *layouts.mlp_rules(),
        *layouts.expert_rules(),
        *shared_rules(),
        *delta_rules(("in_proj_qkvz", "X D"), ("in_proj_ba", "X D")),
    )


FAMILY = Family("qwen3_next", _spec, _rules, ignored=(r"^mtp\.",))
