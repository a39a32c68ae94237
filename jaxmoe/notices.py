"""Warnings of a command, ours and those of libraries: a user who made a mistake is told that, and nothing before it."""

import logging
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from jaxmoe.errors import UserError


class Notices(logging.Handler):
    """While a command runs: what Python's warnings and loggers (from WARNING on) say.

    It is held back until the command calls `begin`. What is held when the command ends goes to stderr, unless it ends
    with a `UserError`.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._held: list[str] = []
        self._show: Callable[[str], None] = self._held.append

    def __enter__(self) -> Self:
        global _current
        self._before = _current, warnings.showwarning
        _current, warnings.showwarning = self, self._warned
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        logging.getLogger().removeHandler(self)
        _current, warnings.showwarning = self._before
        if not isinstance(error, UserError):
            for text in self._held:
                print(text, file=sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Take what a logger says; not of what a signal raised, which asyncio logs once more when nobody took it."""
        if record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt):
            return
        try:
            text = record.getMessage()
        except Exception:  # a library's mistake in its arguments
            text = str(record.msg)
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        self._show(f"{record.levelname.lower()}: {text}")

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self._show(f"warning: {message}")

    def begin(self, show: Callable[[str], None]) -> None:
        """Show what was held and, from now on, all that comes."""
        held, self._held = self._held, []
        self._show = show
        for text in held:
            show(text)


_current: Notices | None = None


def begin(show: Callable[[str], None]) -> None:
    """The command has checked what it was given and does its work from now on. Does nothing outside of a command.

    Args:
        show: takes each warning, a text that begins with its level.
    """
    if _current is not None:
        _current.begin(show)
