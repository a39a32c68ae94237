"""GraniteMoE with windows, sinks, and per layer a rotation of its own or none."""

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import common, granitemoe
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.interop.rules import Rule
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.spec import ModelSpec


def _ropes(config: ConfigReader) -> list[RopeSpec | None]:
    """The rotation of every layer; a base of 0 says none."""
    bases, layers = config.take("layer_rope_theta"), config.size("num_hidden_layers")
    if len(bases) != layers:
        raise UserError(f"{config.file}: layer_rope_theta = {quote(bases)}: expected {layers} entries")
    given = config.take("rope_parameters")
    return [rope_spec(config, {**given, "rope_theta": base}) if base != 0 else None for base in bases]


def _spec(config: ConfigReader) -> ModelSpec:
    layers = zip(common.windows(config), _ropes(config), strict=True)
    mixers = [granitemoe.attention(config, rope, window=window, sinks=True) for window, rope in layers]
    return granitemoe.model(config, mixers)


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return granitemoe.rules(spec, (granitemoe.FUSED, granitemoe.STACKED))


FAMILY = Family("granitemoe_swa", _spec, _rules, unused_fields=granitemoe.UNUSED)
