"""What a family is."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.bounds import MAX_PARAMETERS, check_plausible
from jaxmoe.interop.config_json import ConfigReader, text_config
from jaxmoe.interop.families.mistakes import Mistake
from jaxmoe.interop.rules import Rule
from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import count

TRUNK = "model."

_ROTATION = r"(^|\.)rotary_emb\.inv_freq$"
"""A buffer that older checkpoints hold. It follows from config.json, and transformers does not load it."""

MAX_SPECULATIVE = 100

_MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
"""How many layers predict further tokens, whatever their tensors are called."""

_MTP_TENSOR = re.compile(r"(^|[._])mtp([._]|$)")


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
        speculative: where layers for speculative decoding follow the last one and are counted like it, the fields of
            config.json that say how many; one where it does not say.
        unused_fields: config.json fields that published configs carry and transformers' model never reads.
        text: where in config.json the text model's config is, such as ("text_config",).
        text_type: model_type of that, where a config.json of this type may hold other ones.
        prefixes: of the layouts that are published, the most common one first.
        mistakes: of older versions of transformers, which its folders do not show.
        aliases: model_types of published folders that are this one under a name that transformers does not know.
        sealed: linear layers, by the last part of their names, whose weight transformers' code reads without calling
            them: PEFT refuses to adapt them, or does so in vain.
    """

    model_type: str
    read_spec: Callable[[ConfigReader], ModelSpec]
    named_rules: Callable[[ModelSpec], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ()
    speculative: tuple[str, ...] = ()
    unused_fields: frozenset[str] = frozenset()
    text: tuple[str, ...] = ()
    text_type: str | None = None
    prefixes: tuple[Prefix, ...] = (Prefix(),)
    mistakes: tuple[Mistake, ...] = ()
    aliases: tuple[str, ...] = ()
    sealed: frozenset[str] = frozenset()

    def spec(self, raw: Mapping[str, Any], file: str) -> ModelSpec:
        """The spec of a config.json.

        Raises:
            UserError: a field that is unknown, of a wrong type or value.
        """
        check_plausible(raw, file)
        if raw["model_type"] in self.aliases:
            raw = {**raw, "model_type": self.model_type}
        for name in self.text:
            raw = text_config(raw, name, file, self.unused_fields, self.text_type)
        config = ConfigReader(raw, file, self.unused_fields | set(self.speculative))
        spec = self.read_spec(config)
        config.finish()
        self._speculative_layers(raw, file)
        for problem in spec.problems():
            raise UserError(f"{file}: {problem}")
        parameters = count(spec.declared)
        if parameters > MAX_PARAMETERS:
            raise UserError(
                f"{file}: found sizes of {parameters:,} parameters: expected at most {MAX_PARAMETERS:,}"
            )
        return spec

    def beside(self, raw: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
        """Regular expressions of the tensors that a folder may hold beside the model.

        Args:
            raw: its config.json.
            spec: of the model.
        """
        text = self.text_part(raw)
        depth = len(spec.layers)
        further = "|".join(str(depth + i) for i in range(self._speculative_layers(text, "config.json")))
        layers = [rf"^{re.escape(prefix.trunk)}layers\.({further})\." for prefix in self.prefixes if further]
        return (*self.ignored, *layers, _ROTATION)

    def _speculative_layers(self, text: Mapping[str, Any], file: str) -> int:
        given = {name: text[name] for name in self.speculative if text.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SPECULATIVE:
                raise UserError(
                    f"{file}: {name} = {quote(value)}: expected an integer from 0 to {MAX_SPECULATIVE}"
                )
        return max(given.values(), default=1 if self.speculative else 0)

    def lacking(self, raw: Mapping[str, Any], spec: ModelSpec, tensors: Collection[str]) -> dict[str, int]:
        """Fields of config.json that count layers for multi-token prediction, where there are none among `tensors`.

        Args:
            raw: the config.json.
            spec: of the model.
            tensors: names of all that there are.
        """
        text = self.text_part(raw)
        counted = {name: text.get(name) for name in dict.fromkeys((*self.speculative, *_MTP_FIELDS))}
        declared = {name: count for name, count in counted.items() if isinstance(count, int) and count > 0}
        if not declared:
            return {}
        depth = len(spec.layers)
        further = "|".join(str(depth + i) for i in range(min(max(declared.values()), MAX_SPECULATIVE)))
        layers = re.compile(rf"(^|\.)layers\.({further})\.")
        found = any(layers.search(name) or _MTP_TENSOR.search(name) for name in tensors)
        return {} if found else declared

    def text_part(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text model's part of a config.json that `spec` has read."""
        for name in self.text:
            raw = raw[name]
        return raw

    def with_fields(self, raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with other values of fields of the text model."""

        def changed(part: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
            return {**part, **({path[0]: changed(part[path[0]], path[1:])} if path else fields)}

        return changed(raw, self.text)

    def notes(self, raw: Mapping[str, Any]) -> list[str]:
        """What should be known of the transformers that wrote a folder whose config.json `spec` has read."""
        text = self.text_part(raw)
        told = (mistake.told(raw.get("transformers_version"), text) for mistake in self.mistakes)
        return [note for note in told if note is not None]

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
