"""What a family is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.config_json import ConfigReader, text_config
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import LayerSpec, ModelSpec

TRUNK = "model."


@dataclasses.dataclass(frozen=True)
class Prefix:
    """How a layout of checkpoints begins its tensors' names.

    Attributes:
        trunk: of what stands under ``model.`` in the rules.
        head: of the output head.
    """

    trunk: str = TRUNK
    head: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read and write the checkpoints of one model_type.

    Attributes:
        model_type: as config.json has it.
        read_spec: config.json → `ModelSpec`.
        named_rules: spec → conversion rules, for tensors named ``model.…`` and ``lm_head.…``.
        ignored: regular expressions of tensors that such checkpoints may hold beside the model (towers of other
            modalities, layers for speculative decoding); they are not loaded, and copied as they are on export.
        unused_fields: config.json fields that published configs carry and transformers' model never reads.
        text: where in config.json the text model's config is, such as ("text_config",).
        prefixes: of the layouts that are published, the most common one first.
    """

    model_type: str
    read_spec: Callable[[ConfigReader], ModelSpec]
    named_rules: Callable[[ModelSpec], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ()
    unused_fields: frozenset[str] = frozenset()
    text: tuple[str, ...] = ()
    prefixes: tuple[Prefix, ...] = (Prefix(),)

    def spec(self, raw: Mapping[str, Any], file: str) -> ModelSpec:
        """The spec of a config.json.

        Raises:
            UserError: a field that is unknown, of a wrong type or value.
        """
        for name in self.text:
            raw = text_config(raw, name, file, self.unused_fields)
        config = ConfigReader(raw, file, self.unused_fields)
        spec = self.read_spec(config)
        config.finish()
        for layer in {layer for group in spec.groups for layer in group.pattern}:
            _check_layer(layer, file)
        return spec

    def rules(self, spec: ModelSpec) -> tuple[Rule, ...]:
        """The conversion rules of a model, in every layout."""

        def prefixed(name: str, prefix: Prefix) -> str:
            if name.startswith(TRUNK):
                return prefix.trunk + name.removeprefix(TRUNK)
            return prefix.head + name

        return tuple(
            dataclasses.replace(
                rule,
                source=prefixed(rule.source, prefix),
                copies=tuple(prefixed(name, prefix) for name in rule.copies),
            )
            for prefix in self.prefixes
            for rule in self.named_rules(spec)
        )


def _check_layer(layer: LayerSpec, file: str) -> None:
    heads, kv_heads, window = layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.mixer.window
    if heads % kv_heads:
        raise UserError(
            f"{file}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
        )
    if window is not None and (isinstance(window, bool) or window < 1):
        raise UserError(f"{file}: sliding_window = {window}: expected a positive integer or null")
    if layer.mixer.width_of_value > layer.mixer.head_dim:
        raise UserError(
            f"{file}: values of width {layer.mixer.width_of_value} are wider than keys, {layer.mixer.head_dim}: "
            "that is not supported"
        )
    if layer.moe is None:
        return
    router = layer.moe.router
    chosen, experts, groups = router.top_k, router.num_experts, router.groups
    if chosen > experts:
        raise UserError(f"{file}: num_experts_per_tok {chosen} is more than the {experts} experts")
    if groups is None:
        return
    if experts % groups.count or groups.keep > groups.count:
        raise UserError(
            f"{file}: n_group {groups.count} and topk_group {groups.keep}: expected groups that divide the {experts} "
            "experts, and no more kept than there are"
        )
    size = experts // groups.count
    if size < 2 and groups.rank_by == "top2":
        raise UserError(
            f"{file}: n_group {groups.count} leaves {size} expert per group: expected two or more"
        )
    if chosen > groups.keep * size:
        raise UserError(
            f"{file}: num_experts_per_tok {chosen} is more than the {groups.keep * size} experts of {groups.keep} "
            "groups"
        )
