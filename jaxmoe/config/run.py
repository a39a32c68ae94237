"""A run, as one validated YAML file.

`load_config` reads a file and ``key.path=value`` overrides into a frozen `RunConfig`, whose keys, defaults
and units are described in `jaxmoe.config.sections`. What it refuses ends in a `UserError` of one line that
names the dotted key (`jaxmoe.config.errors` words it).
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from jaxmoe.config.errors import describe
from jaxmoe.config.reading import apply_override, read_mapping
from jaxmoe.config.sections import (
    MAX_TOKENS_PER_STEP,
    BalanceConfig,
    DataConfig,
    Items,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PathText,
    SampleConfig,
    Section,
    Text,
    TrainConfig,
    TrainTokenizer,
)
from jaxmoe.errors import UserError

_WRITTEN = ("export", "checkpoints", "tokenizer", "config.yaml", "metrics.jsonl")
"""What a run writes into its output_dir."""

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class RunConfig(Section):
    """One training run."""

    model: ModelConfig = Field(description=ModelConfig.__doc__)
    data: DataConfig = Field(description=DataConfig.__doc__)
    optimizer: OptimizerConfig = Field(description=OptimizerConfig.__doc__)
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
    then: Items[dict[str, Any]] = Field(
        default=(),
        description="Runs that follow this one: each entry lists the keys that differ. ${output_dir} stands "
        "for the output_dir of this run.",
    )

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
        if train.eval_every is not None and self.data.eval_path is None and self.data.eval_fraction == 0:
            raise ValueError(
                f"train.eval_every: found {train.eval_every}, but nothing to evaluate on; expected "
                "data.eval_path or data.eval_fraction as well"
            )
        if train.export_quantization != "none" and self.model.path is None:
            raise ValueError(
                f"train.export_quantization: found {train.export_quantization!r}, but model.path names no folder that "
                "could be quantised; expected 'none'"
            )
        return self

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "configuration") -> "RunConfig":
        """Validate nested mappings, including every follow-up in ``then``.

        Args:
            mapping: what YAML reads.
            source: begins the message of an error, such as the name of the file.

        Raises:
            UserError: a key is unknown or missing, a value is wrong, or values contradict each other.
        """
        try:
            config = cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise UserError(f"{source}: {describe(error, cls, mapping)}") from None
        config.followups(source)
        return config

    def followups(self, source: str = "configuration") -> "list[RunConfig]":
        """The runs of ``then``, each complete: this run's keys with that entry's on top, and no ``then``.

        An entry that sets ``model.path`` clears ``model.config`` and the other way round.

        Raises:
            UserError: an entry does not make a valid run, or its output_dir gets in the way of another run's.
        """
        runs = [self]
        for index, patch in enumerate(self.then):
            followup = self._followup(patch, f"{source}: then[{index}]")
            for number, run in enumerate(runs):
                place = _overlap(Path(followup.output_dir).resolve(), Path(run.output_dir).resolve())
                if place is not None:
                    other = "the first run" if number == 0 else f"then[{number - 1}]"
                    raise UserError(
                        f"{source}: then[{index}]: output_dir: found {followup.output_dir!r}, which {place} that "
                        f"of {other}, expected another folder, such as ${{output_dir}}-then"
                    )
            runs.append(followup)
        return runs[1:]

    def _followup(self, patch: dict[str, Any], source: str) -> "RunConfig":
        if "then" in patch:
            raise UserError(f"{source}: found a key then, but a follow-up has none; list it in the outer one")
        base = self.model_dump(mode="json", exclude={"then"})
        chosen = patch.get("model")
        if isinstance(chosen, Mapping):
            for given, cleared in (("path", "config"), ("config", "path")):
                if chosen.get(given) is not None:
                    base["model"][cleared] = None
        return RunConfig.from_mapping(_merged(base, _substituted(patch, self.output_dir)), source)

    def all_runs(self) -> "list[RunConfig]":
        """This run and those of ``then``, after a look whether those will find the files that they read.

        Raises:
            UserError: a path of a follow-up leads to nothing, and no run before it writes what would be there.
        """
        runs = [self, *self.followups()]
        first = set(self._paths()) if self.then else set()  # the first run tells what is wrong with these
        for index, run in enumerate(runs[1:]):
            for key, path in run._paths():
                if (key, path) not in first:
                    _check_there(f"then[{index}]: {key}", path, runs[: index + 1])
        return runs

    def _paths(self) -> Iterator[tuple[str, str]]:
        """The files and folders that the run reads, by key; among them a model that may be one of the hub."""
        from jaxmoe.data.files import STANDARD_LIBRARY  # loads pyarrow

        named = {
            "model.path": self.model.path,
            "model.config": self.model.config,
            "data.path": None if self.data.path == STANDARD_LIBRARY else self.data.path,
            "data.eval_path": self.data.eval_path,
            "data.tokenizer": self.data.tokenizer,
        }
        return ((key, path) for key, path in named.items() if isinstance(path, str))

    def _writes(self, path: Path) -> bool:
        """Whether the run writes a model or a tokenizer there."""
        folder = Path(self.output_dir).resolve()
        return (self.train.export and path.is_relative_to(folder / "export")) or (
            isinstance(self.data.tokenizer, TrainTokenizer) and path.is_relative_to(folder / "tokenizer")
        )

    def to_yaml(self) -> str:
        """This run with every key, as YAML that `load_config` reads back to an equal `RunConfig`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from YAML.

    Args:
        path: the file; None for the quickstart that the package carries.
        overrides: ``key.path=value`` each, applied in order, the value read as YAML. A number in the path
            indexes a list (``then.0.train.steps=5``).

    Raises:
        UserError: there is no such file, it is not YAML, it repeats a key, or it is no valid run.
    """
    file = resources.files("jaxmoe.configs") / "quickstart.yaml" if path is None else Path(path)
    mapping = read_mapping(file)
    for override in overrides:
        apply_override(mapping, override)
    source = file.name if path is None else str(path)
    return RunConfig.from_mapping(mapping, f"{source} with overrides" if overrides else source)


def _overlap(folder: Path, other: Path) -> str | None:
    """How a run in one folder would get in the way of a run in another one, or None."""
    if folder == other:
        return "is"
    if other.is_relative_to(folder):
        return "holds"
    return "lies inside" if any(folder.is_relative_to(other / name) for name in _WRITTEN) else None


def _check_there(key: str, path: str, before: Sequence[RunConfig]) -> None:
    place = Path(path).expanduser().resolve()
    if place.exists() or any(run._writes(place) for run in before):
        return
    for run in before:
        if place.is_relative_to(Path(run.output_dir).resolve()):
            raise UserError(
                f"{key}: found {path!r}, which is not there and which the run before does not write: it writes "
                f"{run.output_dir}/export with train.export=true (found {str(run.train.export).lower()}) and "
                f"{run.output_dir}/tokenizer with data.tokenizer.train_bpe; expected a path that is there by then"
            )
    if key.endswith("model.path") and _HUB_ID.fullmatch(path):
        return
    raise UserError(f"{key}: found {path!r}, where there is nothing, expected an existing file or folder")


def _merged(base: Any, patch: Any) -> Any:
    """`patch` on top of `base`, mapping by mapping; anything else replaces."""
    if not isinstance(base, dict) or not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    return base | {key: _merged(base.get(key), value) for key, value in patch.items()}


def _substituted(value: Any, output_dir: str) -> Any:
    if isinstance(value, str):
        return value.replace("${output_dir}", output_dir)
    if isinstance(value, Mapping):
        return {key: _substituted(item, output_dir) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_substituted(item, output_dir) for item in value]
    return value


def _nearest_multiples(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    return f"{below} or {above}" if below else str(above)
