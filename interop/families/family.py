"""What a family is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.rules import Rule
from jaxmoe.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read and write the checkpoints of one model_type.

    Attributes:
        model_type: as config.json has it.
        read_spec: config.json → `ModelSpec`.
        rules: spec → conversion rules.
        ignored: regular expressions of tensors that such checkpoints may hold beside the model; they are not
            loaded, and copied as they are on export.
        unused_fields: config.json fields that published configs carry and transformers' model never reads.
    """

    model_type: str
    read_spec: Callable[[ConfigReader], ModelSpec]
    rules: Callable[[ModelSpec], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ()
    unused_fields: frozenset[str] = frozenset()

    def spec(self, raw: Mapping[str, Any], file: str) -> ModelSpec:
        """The spec of a config.json.

        Raises:
            UserError: a field that is unknown, of a wrong type or value.
        """
        config = ConfigReader(raw, file, self.unused_fields)
        spec = self.read_spec(config)
        config.finish()
        return spec
