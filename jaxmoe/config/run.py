"""A run, as one validated YAML file.

`load_config` reads a file and ``key.path=value`` overrides into a frozen `RunConfig`, whose keys, defaults
and units
are described in `jaxmoe.config.sections` and `jaxmoe.config.data`. What it refuses ends in a `UserError` of
one line that names the dotted key (`jaxmoe.config.errors` words it).
"""

import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from jaxmoe.config.data import DataConfig
from jaxmoe.config.errors import describe
from jaxmoe.config.fields import Items, PathText, Section, Text
from jaxmoe.config.reading import apply_override, read_mapping
from jaxmoe.config.sections import (
    MAX_TOKENS_PER_STEP,
    AdapterConfig,
    BalanceConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from jaxmoe.errors import UserError

_log = logging.getLogger(__name__)


class RunConfig(Section):
    """One training run."""

    model: ModelConfig = Field(description=ModelConfig.__doc__)
    data: DataConfig = Field(description=DataConfig.__doc__)
    optimizer: OptimizerConfig = Field(description=OptimizerConfig.__doc__)
    adapter: AdapterConfig | None = Field(
        default=None, description=f"{AdapterConfig.__doc__} null: none, the weights are trained."
    )
    balance: BalanceConfig = Field(default=BalanceConfig(), description=BalanceConfig.__doc__)
    mesh: MeshConfig = Field(default=MeshConfig(), description=MeshConfig.__doc__)
    train: TrainConfig = Field(description=TrainConfig.__doc__)
    sample: SampleConfig | None = Field(default=None, description=SampleConfig.__doc__)
    trainable: Items[Text] | None = Field(
        default=None,
        description="Regular expressions, searched in the names of the checkpoint's tensors: what is trained. "
        "null: all.",
    )
    frozen: Items[Text] = Field(
        default=(),
        description="The same: what stays as it is, also where `trainable` matches. It is held in model.dtype and has "
        "no gradient and no optimiser state.",
    )
    output_dir: PathText = Field(description="Folder of the run.")

    @model_validator(mode="after")
    def _cross_checks(self) -> "RunConfig":
        train, shards = self.train, self.mesh.batch_shards
        if self.optimizer.warmup_steps > train.steps:
            raise ValueError(
                f"optimizer.warmup_steps: found {self.optimizer.warmup_steps}, expected at most train.steps, "
                f"which is {train.steps}"
            )
        if train.batch_size % train.rows:
            raise ValueError(
                f"train.batch_size: found {train.batch_size}, expected a multiple of train.micro_batch_size "
                f"{train.rows}, such as {_nearest_multiples(train.batch_size, train.rows)}"
            )
        if train.rows % shards:
            key = "batch_size" if train.micro_batch_size is None else "micro_batch_size"
            raise ValueError(
                f"train.{key}: found {train.rows}, expected a multiple of {shards}, over which the mesh "
                f"splits it (data x fsdp x expert), such as {_nearest_multiples(train.rows, shards)}"
            )
        if train.batch_size * self.data.sequence_length > MAX_TOKENS_PER_STEP:
            raise ValueError(
                f"train.batch_size: found {train.batch_size} sequences of {self.data.sequence_length} tokens, "
                f"expected at most {MAX_TOKENS_PER_STEP} tokens per step: lower it, or data.sequence_length"
            )
        if train.eval_every is not None and not self.data.evaluated:
            raise ValueError(
                f"train.eval_every: found {train.eval_every}, but nothing to evaluate on; expected "
                "data.eval_path or data.eval_fraction as well"
            )
        if self.adapter is None and isinstance(train.export, str):
            raise ValueError(
                f"train.export: found {train.export!r}, but the run has no adapter; expected true or false"
            )
        if self.adapter is None and self.model.quantization is not None:
            raise ValueError(
                "model.quantization: found it without adapter, but weights in few bits cannot be trained; expected "
                "null, or an adapter"
            )
        packing = self.model.packing
        loses = packing is not None and packing.kind != "keep"
        if self.adapter is not None and self.adapter.init == "loftq" and not loses:
            raise ValueError(
                "adapter.init: found 'loftq' without a model.quantization that loses anything, with which it begins; "
                "expected another one, such as 'default'"
            )
        if self.adapter is not None and (self.trainable is not None or self.frozen):
            key = "frozen" if self.trainable is None else "trainable"
            raise ValueError(
                f"{key}: found it beside adapter, which says what is trained; expected adapter.modules_to_save instead"
            )
        if train.export_quantization != "none" and self.adapter is not None:
            raise ValueError(
                f"train.export_quantization: found {train.export_quantization!r} beside adapter, whose delta a narrow "
                "format would lose; expected 'none'"
            )
        if train.export_quantization != "none" and self.model.path is None:
            raise ValueError(
                f"train.export_quantization: found {train.export_quantization!r}, but model.path names no folder that "
                "could be quantised; expected 'none'"
            )
        return self

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "configuration") -> "RunConfig":
        """Validate nested mappings.

        Args:
            mapping: what YAML reads.
            source: begins the message of an error, such as the name of the file.

        Raises:
            UserError: a key is unknown or missing, a value is wrong, or values contradict each other.
        """
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise UserError(f"{source}: {describe(error, cls, mapping)}") from None

    def to_yaml(self) -> str:
        """This run with every key, as YAML that `load_config` reads back to an equal `RunConfig`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from YAML.

    Args:
        path: the file; None for the quickstart that the package carries.
        overrides: ``key.path=value`` each, applied in order, the value read as YAML.

    Raises:
        UserError: there is no such file, it is not YAML, it repeats a key, or it is no valid run.
    """
    file = resources.files("jaxmoe.configs") / "quickstart.yaml" if path is None else Path(path)
    mapping = read_mapping(file)
    for override in overrides:
        apply_override(mapping, override)
    if note := _renamed(mapping):
        _log.warning("%s: %s", file, note)
    source = file.name if path is None else str(path)
    return RunConfig.from_mapping(mapping, f"{source} with overrides" if overrides else source)


def recorded_config(file: Path) -> RunConfig:
    """The configuration that a run wrote into its folder, in this version or an earlier one.

    Raises:
        UserError: the file is not there, cannot be read, or is no valid run.
    """
    mapping = read_mapping(file)
    _renamed(mapping)
    mapping.pop("then", None)  # in 0.1.0, the runs that came after this one: no part of it
    return RunConfig.from_mapping(mapping, str(file))


def _renamed(mapping: dict[str, Any]) -> str | None:
    """Put the name of today for one of 0.1.0, which is that of other libraries; says so."""
    optimizer = mapping.get("optimizer")
    if not isinstance(optimizer, dict) or optimizer.get("coefficients") != "quintic":
        return None
    optimizer["coefficients"] = "you_jiacheng"
    return "optimizer.coefficients: quintic is called you_jiacheng here, the numbers are the same"


def _nearest_multiples(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    return f"{below} or {above}" if below else str(above)
