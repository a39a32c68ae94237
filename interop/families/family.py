"""What a family is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.interop.rules import Rule
from jaxmoe.model.moe import MoESpec
from jaxmoe.spec import LayerSpec, ModelSpec


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
        for layer in {layer for group in spec.groups for layer in group.pattern}:
            _check_layer(layer, file)
        return spec


def _check_layer(layer: LayerSpec, file: str) -> None:
    heads, kv_heads, window = layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.mixer.window
    if heads % kv_heads:
        raise UserError(
            f"{file}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
        )
    if window is not None and (isinstance(window, bool) or window < 1):
        raise UserError(f"{file}: sliding_window = {window}: expected a positive integer or null")
    if isinstance(layer.ffn, MoESpec) and layer.ffn.router.top_k > layer.ffn.router.num_experts:
        chosen, experts = layer.ffn.router.top_k, layer.ffn.router.num_experts
        raise UserError(f"{file}: num_experts_per_tok {chosen} is more than the {experts} experts")
