"""The command line: one console script whose subcommands are modules, and how a command ends.

A mistake of the user ends in one line and exit code 2, SIGINT in 130 and SIGTERM in 143. Everything else is a
fault of the program and keeps its traceback.
"""

import argparse
import difflib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxmoe.errors import UserError, out_of_memory, shortened
from jaxmoe.notices import Notices
from jaxmoe.signals import ENDINGS, Signals
from jaxmoe.torchless import leave_torch_out

COMMANDS: dict[str, str] = {
    "train": "jaxmoe.train",
    "export": "jaxmoe.export",
    "merge": "jaxmoe.merge",
    "generate": "jaxmoe.generate",
    "inspect": "jaxmoe.inspect",
}
"""Module of every subcommand; each has a function ``main(argv: list[str]) -> int | None``."""

_SUMMARIES = {
    "train": "fine-tune a model as a YAML file says",
    "export": "write a checkpoint of a run as a Hugging Face folder",
    "merge": "write a model with a LoRA adapter merged into it",
    "generate": "continue a prompt",
    "inspect": "check a model folder or a config.json and say what is in it",
}

EXIT_USER_ERROR = 2
_MOST_LETTERS = 1500
"""Of an error: what is quoted may be of any length, and the remedy stands in what is said of the first problem."""
_SIGNALLED = 128
_THREADS_SECONDS = 5.0
"""How long the interpreter may wait for threads after a signal or a mistake has ended the command."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose refusals are the one line of a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found, which may quote a value of any length."""
        raise UserError(f"{shortened(message)}; {self.prog} --help tells what is expected")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``jaxmoe COMMAND …``; `argv` is by default that of the process. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _exit_code(lambda: _dispatch(arguments))


def script() -> NoReturn:
    """The console script ``jaxmoe``."""
    leave_torch_out()
    _end(main())


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """End the process with what `main` returns for its command line; None is 0.

    For the bottom of a command's module: ``if __name__ == "__main__": run_command(main)``.
    """
    leave_torch_out()
    _end(_exit_code(lambda: main(sys.argv[1:])))


def _dispatch(arguments: list[str]) -> int | None:
    if not arguments:
        print(_usage(), file=sys.stderr)
        return EXIT_USER_ERROR
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        from importlib import metadata  # loads more than all the rest of this module

        print(f"jaxmoe {metadata.version('jaxmoe')}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command!r}, {remedy}")
    # Imported only now: a typing mistake is told at once, without waiting for jax.
    return importlib.import_module(COMMANDS[command]).main(rest)


def _end(code: int) -> NoReturn:
    """End the process. After a signal or a mistake that is soon, whatever threads are at: compiling, for one."""
    if code > _SIGNALLED:
        # What was cut short in threads of libraries tells so in tracebacks.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        logging.disable()
    if code:
        killer = threading.Timer(_THREADS_SECONDS, os._exit, [code])
        killer.daemon = True
        killer.start()
    sys.exit(code)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = (f"  {name:{width}}  {_SUMMARIES[name]}" for name in COMMANDS)
    return "\n".join(
        (
            "usage: jaxmoe COMMAND ...",
            "",
            "commands:",
            *listed,
            "",
            "jaxmoe COMMAND --help tells more; jaxmoe --version tells the version",
        )
    )


def _exit_code(command: Callable[[], int | None]) -> int:
    with Signals() as signals:
        try:
            with Notices():
                return _told_of_memory(command) or 0
        except BaseException as error:
            number = signals.ended_by(error)
            if number is not None:
                print(ENDINGS[number], file=sys.stderr)
                return _SIGNALLED + number
            if not isinstance(error, UserError):
                raise
            print(shortened(f"error: {_one_line(str(error))}", _MOST_LETTERS), file=sys.stderr)
            return EXIT_USER_ERROR


def _told_of_memory(command: Callable[[], int | None]) -> int | None:
    try:
        return command()
    except Exception as error:
        told = out_of_memory(error)
        if told is None:
            raise
        raise UserError(f"{told}; free some of it, or use a machine or a device that has more") from error


def _one_line(text: str) -> str:
    """Names of files and keys may hold anything: line breaks, control characters, bytes that are no UTF-8."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
