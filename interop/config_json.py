"""Reading config.json: transformers' config classes give the defaults and both generations of spellings.

A family takes the fields that it handles; whatever it does not take must be known not to change the
computation, or stand at its default. So a field that a newer checkpoint introduces is an error and never
silently ignored.
"""

import copy
import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Without torch, transformers says on stderr at import that its models will be missing; ours are not its.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxmoe.torchless import importing_transformers

with importing_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging as transformers_logging

from jaxmoe.errors import UserError, first_line, listed, quote, shortened
from jaxmoe.files import read_text
from jaxmoe.interop.bounds import MAX_BYTES, MAX_LAYERS, MAX_SIZE, check_text

_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_REQUIRED: Any = object()
_DTYPE_FIELDS = ("dtype", "torch_dtype")
_DTYPES = (None, "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "auto")
"""In which a folder is stored, its tensors say; transformers looks the name up and fails at others."""
_TOLD = 8  # problems, of which there may be thousands

# Fields that change nothing in a training forward pass: bookkeeping, token ids, generation, reporting.
_INERT = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "head_dim",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "num_experts",
        "num_local_experts",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "partial_rotary_factor",
        "problem_type",
        "return_dict",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_return_dict",
    }
)

# What transformers 4 wrote into the configs within a config: its defaults for generation, and bookkeeping.
_GENERATION = """
    add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id is_decoder length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix pruned_heads
    remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    typical_p use_bfloat16
"""


class ConfigReader:
    """One config.json with its defaults filled in; remembers which fields were taken.

    Attributes:
        raw: the JSON object, with the numbers that JSON lacks.
        file: what to call it in error messages.
    """

    def __init__(self, raw: Mapping[str, Any], file: str, unused: frozenset[str] = frozenset()):
        """Parse `raw`.

        Args:
            raw: the JSON object; its model_type must be one that transformers knows.
            file: name for messages.
            unused: fields that published configs of the family carry though its code never reads them.

        Raises:
            UserError: a field of the wrong type, or two spellings of one field that disagree.
        """
        self.raw = raw = _numbers(raw)
        self.file = file
        self._inert = _INERT.union(_GENERATION.split(), unused)
        self._taken: set[str] = set()
        config_class = CONFIG_MAPPING[raw["model_type"]]
        for alias, name in config_class.attribute_map.items():
            if alias in raw and name in raw and raw[alias] != raw[name]:
                raise UserError(
                    f"{file}: {alias} = {quote(raw[alias])} and {name} = {quote(raw[name])} mean the same; keep one"
                )
        for name in _DTYPE_FIELDS:
            if name in raw and raw[name] not in _DTYPES:
                raise UserError(
                    f"{file}: {name} = {quote(raw[name])}: expected {', '.join(filter(None, _DTYPES))}"
                )
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # what matters of a config is checked here, and is an error
        try:
            # The class fills in nested objects in place, and looks the dtype up in torch.
            fields = copy.deepcopy({n: v for n, v in raw.items() if n not in _DTYPE_FIELDS})
            self._config = config_class.from_dict(fields)
            self._config.standardize_rope_params()
        except Exception as error:  # the class raises its own, many kinds
            raise UserError(f"{file}: {shortened(' '.join(str(error).split()), 600)}") from error
        finally:
            transformers_logging.set_verbosity(verbosity)
        self._defaults = _defaults(raw["model_type"])
        self._spellings = config_class.attribute_map
        self._known = {field.name for field in dataclasses.fields(config_class)}.union(
            self._spellings, self._spellings.values()
        )

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field, by either of its spellings.

        Raises:
            UserError: the field is absent and has no default.
        """
        self._taken.add(name)
        try:
            value = getattr(self._config, name, None)
        except RuntimeError:  # so transformers says that there is no one value
            raise UserError(
                f"{self.file}: per_layer_config gives layers different values of {name}: that is not supported"
            ) from None
        if value is None and default is not _REQUIRED:
            return default
        if value is None:
            raise UserError(f"{self.file}: {name!r} is missing")
        return value

    def of_layers(self, *differing: str) -> list["ConfigReader"]:
        """A reader per layer, where ``per_layer_config`` may have other values of the fields `differing`.

        Raises:
            UserError: it has other fields.
        """
        layers = self.size("num_hidden_layers", MAX_LAYERS)
        self._taken.add("per_layer_config")
        given = self.raw.get("per_layer_config") or {}
        other = sorted({name for fields in given.values() for name in fields} - set(differing))
        if other:
            raise UserError(
                f"{self.file}: per_layer_config has {listed(list(map(quote, other)), _TOLD)}: supported are "
                f"{' and '.join(map(repr, differing))}"
            )
        readers = [copy.copy(self) for _ in range(layers)]  # they share what was taken
        for index, reader in enumerate(readers):
            reader._config = self._config.per_layer_config[index]
        return readers

    def size(self, name: str, most: int = MAX_SIZE) -> int:
        """The value of a field that must be a positive integer.

        Raises:
            UserError: it is absent, or another value.
        """
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.file}: {name} = {quote(value)}: expected a positive integer")
        if value > most:
            raise UserError(f"{self.file}: {name} = {quote(value)}: expected at most {most:,}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, zero: bool = False) -> float:
        """The value of a field that must be a positive finite number, or with `zero` may be 0.

        Raises:
            UserError: it is absent without a default, or another value.
        """
        value = self.take(name, default)
        if not (is_positive(value) or (zero and not isinstance(value, bool) and value == 0)):
            expected = "0 or a positive number" if zero else "a positive number"
            raise UserError(f"{self.file}: {name} = {quote(value)}: expected {expected}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse any value of `name` but `allowed`.

        Raises:
            UserError: another value.
        """
        value = self.take(name, None)
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"{self.file}: {name} = {quote(value)} is not supported; expected {choices}")

    def finish(self) -> None:
        """Check that nothing in the file was overlooked.

        Raises:
            UserError: fields that are unknown, or known but not at their default and not taken.
        """
        passed = self._taken | self._inert
        passed |= {other for pair in self._spellings.items() if passed.intersection(pair) for other in pair}
        problems = [
            name
            for name, value in self.raw.items()
            if name not in passed
            and (name not in self._known or value != getattr(self._defaults, name, None))
        ]
        if problems:
            told = [self._overlooked(name) for name in problems[:_TOLD]]
            raise UserError(f"{self.file}: {listed(told + problems[_TOLD:], _TOLD, '; ')}")

    def _overlooked(self, name: str) -> str:
        if name not in self._known:
            return f"unknown field {quote(name)}{_hint(name, self._known)}"
        default = getattr(self._defaults, name, None)
        return f"{name} = {quote(self.raw[name])} is not supported (only {quote(default)})"


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1) if len(name) < 100 else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def text_config(
    raw: Mapping[str, Any],
    name: str,
    file: str,
    unused: frozenset[str] = frozenset(),
    model_type: str | None = None,
) -> dict[str, Any]:
    """The part `name` of a config.json of several models in one, such as "text_config".

    Whether input and output embeddings are tied is the whole's to say where it says it.

    Args:
        raw: the whole.
        name: of the part.
        file: for errors.
        unused: fields that do not matter.
        model_type: that the part has to say; None where the whole has parts of one type alone.

    Raises:
        UserError: the whole has fields that transformers does not know and that are not `unused`, or the part is
            missing or of another type.
    """
    config_class = CONFIG_MAPPING[raw["model_type"]]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    unknown = sorted(raw.keys() - known - _INERT - unused)
    if unknown:
        names = listed([quote(name) for name in unknown], _TOLD)
        raise UserError(f"{file}: unknown fields {names}{_hint(unknown[0], known)}")
    part = raw.get(name)
    if not isinstance(part, dict):
        raise UserError(f"{file}: {name} = {quote(part)}: expected an object with the text model's fields")
    if model_type is None:
        part = part | {"model_type": config_class.sub_configs[name].model_type}  # whatever it says of itself
    elif part.get("model_type") != model_type:
        raise UserError(
            f"{file}: model_type = {quote(part.get('model_type'))} of {name} is not supported; expected {model_type!r}"
        )
    tied = raw.get("tie_word_embeddings", getattr(config_class(), "tie_word_embeddings", None))
    if tied is not None and not isinstance(tied, bool):
        raise UserError(f"{file}: tie_word_embeddings = {quote(tied)}: expected true or false")
    return part if tied is None else part | {"tie_word_embeddings": tied}


def _numbers(value: Any) -> Any:
    """JSON with the numbers that it lacks, as transformers 5 writes them: ``{"__float__": "Infinity"}``."""
    match value:
        case {"__float__": "Infinity" | "-Infinity" | "NaN" as spelt}:
            return float(spelt)
        case Mapping():
            return {name: _numbers(one) for name, one in value.items()}
        case list():
            return list(map(_numbers, value))
    return value


@functools.cache
def _defaults(model_type: str) -> Any:
    """A config that says nothing else."""
    return CONFIG_MAPPING[model_type]()


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 that a float32 holds; true is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= _MAX_FLOAT32


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        UserError: it is missing, not JSON, larger than any, or not an object with a model_type.
    """
    try:
        text = read_text(path, MAX_BYTES)
        check_text(text, str(path))
        raw = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected the config.json of a Hugging Face model") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError also for numbers of many digits
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{path} is not readable JSON: {reason}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"{path}: expected a JSON object with a string 'model_type'")
    return raw
