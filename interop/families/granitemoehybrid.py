"""Granite 4: GraniteMoE with Mamba 2 in most layers, and in the others attention with or without a rotation."""

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader, is_positive
from jaxmoe.interop.families import common, granitemoe, layouts
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.mixers.mamba2 import Mamba2Spec
from jaxmoe.model.spec import ModelSpec

# Of new weights and of kernels; there is one kind of norm.
_UNUSED = frozenset({"init_method", "mamba_chunk_size", "normalization_function"})


def _step_limits(config: ConfigReader) -> tuple[float, float]:
    value = config.take("time_step_limit", None)
    match value:
        case (least, most) if (least == 0 or is_positive(least)) and least < most:
            return float(least), float(most)
    raise UserError(
        f"{config.file}: time_step_limit = {quote(value)}: expected two numbers, 0 or more and then a larger one"
    )


def _mamba(config: ConfigReader) -> Mamba2Spec:
    config.expect("mamba_proj_bias", False)  # no published model has one
    config.take("mamba_expand")  # the config class checks it against heads and their width
    least, most = _step_limits(config)
    return Mamba2Spec(
        num_heads=config.size("mamba_n_heads"),
        num_groups=config.size("mamba_n_groups"),
        head_dim=config.size("mamba_d_head"),
        state_size=config.size("mamba_d_state"),
        taps=config.size("mamba_d_conv"),
        norm=common.rms_norm(config),
        convolution_bias=config.take("mamba_conv_bias"),
        least_step=least,
        most_step=most,
    )


def _spec(config: ConfigReader) -> ModelSpec:
    config.expect("position_embedding_type", "rope", "nope", None)
    rotates = config.take("position_embedding_type", None) == "rope"
    config.take("rope_parameters", None)  # there are some though nothing may rotate
    mixers: dict[str, Mixer] = {
        "linear_attention": _mamba(config),
        "full_attention": granitemoe.attention(config, rope_spec(config) if rotates else None),
    }
    types = common.kinds(config, "layer_types", tuple(mixers))
    return granitemoe.model(config, [mixers[kind] for kind in types], unread={})


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (*granitemoe.rules(spec), *layouts.mamba2_rules("mamba"))


FAMILY = Family("granitemoehybrid", _spec, _rules, unused_fields=granitemoe.UNUSED | _UNUSED)
