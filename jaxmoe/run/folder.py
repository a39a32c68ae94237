"""The folder of a run: what lies where in it, its metrics, and a lock that keeps a second process out."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxmoe import files
from jaxmoe.config import RunConfig, recorded_config
from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, partial, sync, write_atomically
from jaxmoe.parallel import processes

# What may change between the start of a run and its resumption, because it changes no weight. The folder's
# own name is not compared either: the folder may have been moved.
_FREE_KEYS = frozenset(
    {
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.eval_every",
        "train.peak_tflops",
        "train.export",
        "data.eval_tokens",
        "data.max_record_bytes",
        "data.cache",
        "data.prepare",
        "data.workers",
        "sample",
        "output_dir",
    }
)


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """What lies where in the folder of a run. Nobody else knows these names.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The run as resolved, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The file of metrics, JSON Lines."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; see `jaxmoe.run.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the exported model, as Hugging Face's."""
        return self.path / "export"

    @property
    def merged(self) -> Path:
        """Folder of the model with the run's adapter merged in, beside the adapter itself in `export`."""
        return self.path / "merged"

    @property
    def tokenizer(self) -> Path:
        """Folder of a tokenizer that was made for the run."""
        return self.path / "tokenizer"

    @property
    def chat_template(self) -> Path:
        """The chat template that the run names, which may not be that of its tokenizer."""
        return self.path / "chat_template.jinja"

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
        return self.path / ".lock"

    def holds_run(self) -> bool:
        """Whether there is anything that training made; a start that failed leaves nothing of it."""
        if self.metrics.exists() or self.export.exists() or self.merged.exists():
            return True
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def is_failed_start(self) -> bool:
        """Whether a locked folder holds what this program writes before it trains, and nothing else."""
        own = {self.lock, self.config, partial(self.config), self.checkpoints, *self.tokenizers}
        return set(self.path.iterdir()) <= own and not self.holds_run()

    @property
    def tokenizers(self) -> tuple[Path, Path]:
        """The tokenizer's folder, and what it is called until it is whole."""
        return self.tokenizer, partial(self.tokenizer)


class RunFolder:
    """An open run folder. Only process 0 touches files, but every process calls every method.

    Attributes:
        path: the folder.
        layout: what lies where in it.
        resumed: whether it held this run already. A start that failed before the first step is none.
    """

    def __init__(self, path: Path, *, resumed: bool, lock: int | None) -> None:
        """For `open`. `lock` is the descriptor of the locked file; None for processes that do not write."""
        self.path = path
        self.layout = RunLayout(path)
        self.resumed = resumed
        self._lock = lock

    @classmethod
    def open(cls, config: RunConfig) -> "RunFolder":
        """Create ``config.output_dir``, or open it where it holds this same run.

        Raises:
            UserError: it holds another run or something else, another process writes it, or it cannot be
                written.
        """
        path = Path(config.output_dir)
        resumed, lock = processes.first(lambda: _claim(RunLayout(path), config))
        return cls(path, resumed=resumed, lock=lock if jax.process_index() == 0 else None)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line of metrics, on disk when this returns.

        Args:
            record: values by name, among them ``step``; numbers, strings, arrays, nested lists and mappings.
                JSON has no nan and no infinity: they become the strings "nan", "inf" and "-inf".

        Raises:
            UserError: the line cannot be written, such as on a full disk.
            ValueError: no ``step``, or a value that is none of those.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record needs an integer step, found {record.get('step')!r}")
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        processes.first(lambda: self._write(line))

    def _write(self, line: str) -> None:
        try:
            with self.layout.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
                sync(file)
        except OSError as error:
            raise cannot_write(f"{self.layout.metrics}: cannot write", error) from None

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after `step`, and a last line that was cut off in the middle.

        Raises:
            UserError: another line than the last is no record, or the file cannot be read or rewritten.
        """
        processes.first(lambda: self._truncate(step))

    def _truncate(self, step: int) -> None:
        try:
            before = self.layout.metrics.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"{self.layout.metrics}: cannot read: {error.strerror}; expected the file that this run logs to: "
                "move it away"
            ) from None
        kept = b"".join(line for found, line in self._records(before) if found <= step)
        if kept != before:
            write_atomically(self.layout.metrics, kept.decode("utf-8"))

    def _records(self, content: bytes) -> Iterator[tuple[int, bytes]]:
        """Step and text of every whole record; only the last may lack its line break."""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                yield int(record["step"]), line.rstrip(b"\n") + b"\n"
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise UserError(
                        f"{self.layout.metrics}: line {number} is no record of metrics: delete that line to resume"
                    ) from None

    def close(self) -> None:
        """Let another process write the folder; the end of this process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _claim(layout: RunLayout, config: RunConfig) -> tuple[bool, int]:
    """Whether the folder held this run already, and the descriptor of its lock."""
    path = layout.path
    try:
        _refuse_foreign(layout)
        path.mkdir(parents=True, exist_ok=True)
        ours = layout.lock.exists()
        lock = files.lock(layout.lock, f"output_dir {path}")
    except OSError as error:
        raise cannot_write(f"output_dir {path}: cannot write there", error) from None
    try:
        failed_start = ours and layout.is_failed_start()
        resumed = layout.config.exists() and not failed_start
        if resumed:
            _refuse_other_run(layout, config)
        elif failed_start:  # the command that follows it is the corrected one
            for folder in layout.tokenizers:
                shutil.rmtree(folder, ignore_errors=True)
        text = config.to_yaml()
        if not resumed or layout.config.read_text(encoding="utf-8") != text:
            write_atomically(layout.config, text)
    except BaseException:
        os.close(lock)
        raise
    return resumed, lock


def _refuse_foreign(layout: RunLayout) -> None:
    path = layout.path
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path}: found a file, expected a folder or nothing: choose another name")
    for file in (layout.lock, layout.config, layout.metrics):  # to open a pipe would wait for ever
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(
                f"{file}: found no regular file, expected one of this run's: choose another output_dir"
            )
    if not path.exists() or layout.config.exists():
        return
    # A run killed while it began leaves these.
    own = {layout.lock, partial(layout.config)}
    others = sorted(entry.name for entry in path.iterdir() if entry not in own)
    if others:
        raise UserError(
            f"output_dir {path}: found a folder with {others[0]!r} in it but no {layout.config.name}, expected an "
            "empty folder or that of a run: choose another one"
        )


def _refuse_other_run(layout: RunLayout, config: RunConfig) -> None:
    there = dict(_flat(recorded_config(layout.config).model_dump(mode="json")))
    here = dict(_flat(config.model_dump(mode="json")))
    differences = [
        f"{key} is {_shown(there, key)} there and {_shown(here, key)} here"
        for key in [*here, *(there.keys() - here.keys())]
        if there.get(key, ...) != here.get(key, ...)
    ]
    if differences:
        export = layout.export
        key = "model.path" if config.adapter is None else "adapter.path"
        longer = f"; to train further, start a new run with {key}={export}" if export.exists() else ""
        raise UserError(
            f"output_dir {layout.path}: holds another run: {'; '.join(differences)}: choose another output_dir, or "
            f"give the values from there to resume that run{longer}"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in _FREE_KEYS:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{dotted}.")
        else:
            yield dotted, value


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"


def _plain(value: Any) -> Any:
    """What JSON can hold of a value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        # ml_dtypes such as bfloat16 become Python floats by way of float64.
        return _plain(array.tolist() if array.dtype.kind in "biuf" else array.astype(np.float64).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"metrics hold numbers, strings and arrays, found {type(value).__name__}: {value!r}")
