"""``adapter_config.json``: what of it changes an adapter's values, understood or refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jaxmoe.config.errors import describe
from jaxmoe.errors import UserError, first_line, listed, quote
from jaxmoe.files import read_text

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

_MAX_BYTES = 16 << 20  # full names of every linear layer of the largest models take some 5
_TOLD = 5

_IGNORED = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
"""Bookkeeping, how factors are initialised, and VeLoRA, which changes the backward pass alone."""

_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts on a part of the tokens only and cannot be merged: train without it",
    "arrow_config": "Arrow routes tokens among several adapters: give each of them alone",
    "ensure_weight_tying": "tied adapters are not read: train with ensure_weight_tying false, or untie the embeddings",
    "fan_in_fan_out": "no linear layer of these models keeps (in, out): set it to false, as PEFT does by itself",
    "kasa_config": "KaSA truncates the base weights: merge it with PEFT (merge_and_unload)",
    "layer_replication": "it repeats layers of the model: build that model first and adapt it",
    "lora_bias": "biases of B are not read: merge it with PEFT (merge_and_unload)",
    "megatron_config": "it is of Megatron's layers: export it from there",
    "monteclora_config": "its weights are drawn at random: merge it with PEFT (merge_and_unload)",
    "trainable_token_indices": "single rows of embeddings are not read: merge it with PEFT (merge_and_unload)",
    "use_bdlora": "block-diagonal factors are not read: merge it with PEFT (merge_and_unload)",
    "use_qalora": "QALoRA pools the inputs of quantised layers: train without it",
}
"""Fields that change values, each with the remedy."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Names = tuple[str, ...]
Positive = Annotated[int, Field(gt=0)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """A LoRA adapter as PEFT describes it; the fields have PEFT's names and meanings.

    Ranks are per expert. `target_modules` is a list of endings of modules' names, a regular expression of whole
    names, or "all-linear"; `target_parameters` are endings of parameters' names. Keys of the patterns are regular
    expressions of a name's end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: Literal["LORA"]
    r: Positive = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    target_parameters: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | str | None = None
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    modules_to_save: Names | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    peft_version: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} = {quote(getattr(self, name))} with target_modules = {quote(self.target_modules)}: "
                        "expected null, or a list of target_modules; put the layers into the expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern = {quote(self.layers_pattern)} without layers_to_transform: expected both or neither"
            )
        given = self.init_lora_weights
        if isinstance(given, str) and given.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"init_lora_weights = {quote(given)}, which changes the base weights: expected an adapter of the "
                "unchanged ones; save it with PEFT's path_initial_model_for_weight_conversion"
            )
        return self

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on B A: alpha over the rank, with `use_rslora` over its root."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_adapter_config(raw: Mapping[str, Any], file: str) -> AdapterConfig:
    """The content of an adapter_config.json.

    Args:
        raw: the JSON object.
        file: what to call it in messages.

    Raises:
        UserError: what it says cannot be read, or would change values in a way that is not understood.
    """
    known = {name: value for name, value in raw.items() if name in AdapterConfig.model_fields}
    # PEFT's defaults of these are empty dictionaries, and null in configs of some tools.
    known |= {name: {} for name in ("rank_pattern", "alpha_pattern") if raw.get(name, {}) is None}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    problems = [
        problem
        for name, value in raw.items()
        if name not in AdapterConfig.model_fields and (problem := _refusal(name, value))
    ]
    if raw.get("peft_type") != "LORA":  # before the others: they mean something else in it
        raise UserError(
            f"{file}: peft_type = {quote(raw.get('peft_type'))}: expected 'LORA'; other methods are not supported, "
            "merge it with PEFT (merge_and_unload)"
        )
    if problems:
        raise UserError(f"{file}: {listed(problems, _TOLD, '; ')}")
    try:
        return AdapterConfig.model_validate(known)
    except ValidationError as error:
        raise UserError(f"{file}: {describe(error, AdapterConfig, known)}") from None


def _refusal(name: str, value: Any) -> str | None:
    if name in _IGNORED or not value:  # null, false, 0 and empty: the feature is off
        return None
    if name in _REFUSED:
        return f"{name} = {quote(value)}: expected it off; {_REFUSED[name]}"
    return (
        f"unknown field {quote(name)} = {quote(value)}: expected none that may change the weights; remove it if it "
        "does not, or merge the adapter with the PEFT that wrote it"
    )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of an adapter's folder.

    Raises:
        UserError: it is missing, no JSON object, or refused by `parse_adapter_config`.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(read_text(path, _MAX_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected the folder of a PEFT adapter") from None
    except (ValueError, RecursionError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{path} is not readable JSON: {reason}; download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {quote(raw)}, expected a JSON object; download it again")
    return parse_adapter_config(raw, str(path))
