"""What a run shows: a live line on a terminal, plain lines in a log file."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxmoe import notices


class RunDisplay:
    """Shows a run's progress and its warnings on stdout, which leaves stderr to an error; silent in all processes but
    the first.
    """

    def __init__(self, steps: int, done: int, quiet: bool) -> None:
        # No markup: paths and generated text may hold anything in brackets.
        self._console = Console(quiet=quiet, highlight=False, markup=False)
        self._steps = steps
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, figures="")

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        notices.begin(_to_stderr if self._console.quiet else self.say)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int, figures: str) -> None:
        """Move the live line to `done` steps."""
        self._progress.update(self._task, completed=done, figures=figures)

    def logged(self, done: int, figures: str) -> None:
        """A step that is written to metrics.jsonl: a line of its own where there is no live line."""
        if self._progress.disable:
            self._console.print(f"step {done}/{self._steps}  {figures}", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of its own, above the live line."""
        self._console.print(text, soft_wrap=True)


class RowProgress:
    """Shows on stderr how many rows are prepared, where it is a terminal; silent in all processes but the first."""

    def __init__(self, name: str, total: int):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]prepare {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=jax.process_index() != 0 or not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Callable[[int], Any]:
        self._progress.start()
        return lambda rows: self._progress.update(self._task, completed=rows)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _to_stderr(text: str) -> None:
    """Warnings of the other processes."""
    print(text, file=sys.stderr, flush=True)


def show_table(title: str, rows: dict[str, str]) -> None:
    """A small two-column table on stdout."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)
