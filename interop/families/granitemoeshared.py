"""GraniteMoE with a shared expert."""

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.families import granitemoe
from jaxmoe.interop.families.family import Family
from jaxmoe.interop.families.rotation import rope_spec
from jaxmoe.model.spec import ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    return granitemoe.model(config, granitemoe.attention(config, rope_spec(config)))


FAMILY = Family("granitemoeshared", _spec, granitemoe.rules, unused_fields=granitemoe.UNUSED)
