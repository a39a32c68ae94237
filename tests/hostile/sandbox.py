"""A command in a process that is watched: what it says, how it ends, what it takes."""

import contextlib
import dataclasses
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MOST_RESIDENT = 10**9
"""Bytes of a command with a tiny model, the interpreter and jax with their 300 MB included."""

MOST_CPU = 5.0
"""Seconds until a mistake is told; what was imported before is not counted."""

MOST_COMPILING = 1.6e9
"""The same of one that compiles a step: XLA takes most of the 1.1 GB of a tiny run with which nothing is wrong."""

_KILLED_RESIDENT = 4 * 10**9
_MOST_LETTERS = 1500


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code; negative: the signal that killed it.
        out, err: what it printed.
        cpu: seconds.
        resident: most bytes at any time.
        seconds: by the clock.
    """

    code: int
    out: str
    err: str
    cpu: float
    resident: int
    seconds: float

    def faults(self, *codes: int, cpu: float = MOST_CPU) -> list[str]:
        """What of it a user should never see, where it should have ended with one of `codes`.

        One that may take more than `MOST_CPU` seconds may compile.
        """
        found = []
        if self.code not in codes:
            found.append(f"exit code {self.code}, expected {' or '.join(map(str, codes))}")
        if "Traceback" in self.out + self.err:
            found.append("traceback")
        if self.code == 2 and (len(self.err.splitlines()) != 1 or not self.err.startswith("error: ")):
            found.append(f"{len(self.err.splitlines())} lines on stderr")
        if len(self.err.rstrip("\n")) > _MOST_LETTERS:
            found.append(f"{len(self.err)} letters on stderr")
        if self.cpu > cpu:
            found.append(f"{self.cpu:.1f} s of CPU")
        if self.resident > (MOST_RESIDENT if cpu <= MOST_CPU else MOST_COMPILING):
            found.append(f"{self.resident / 1e6:.0f} MB")
        return found


@dataclasses.dataclass
class Running:
    """A command that has been started with `start`."""

    pid: int
    started: float
    out: Path
    err: Path

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def finish(self, seconds: float = 300.0) -> Outcome:
        """Wait for its end; after so many seconds, or with too much memory, kill it."""
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self.started > seconds or _resident(self.pid) > _KILLED_RESIDENT:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        texts = [file.read_text("utf-8", "replace") for file in (self.out, self.err)]
        for file in (self.out, self.err):
            file.unlink()
        return Outcome(
            os.waitstatus_to_exitcode(status),
            *texts,
            cpu=usage.ru_utime + usage.ru_stime,
            resident=usage.ru_maxrss * 1024,
            seconds=time.monotonic() - self.started,
        )


def start(arguments: list[str], folder: Path, before: Callable[[], None] | None = None) -> Running:
    """Start ``jaxmoe ARGUMENTS`` in a fork of this process, which has imported everything and used no device.

    Args:
        arguments: of the command line.
        folder: working directory.
        before: called in the new process.
    """
    out, err = (Path(tempfile.mkstemp()[1]) for _ in range(2))
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, folder, out, err, before)
    return Running(pid, started, out, err)


def run(
    arguments: list[str], folder: Path, before: Callable[[], None] | None = None, seconds: float = 120.0
) -> Outcome:
    """`start`, and wait for the end."""
    return start(arguments, folder, before).finish(seconds)


def prepare() -> None:
    """Import what commands import, once for all forks."""
    import jaxmoe.export
    import jaxmoe.generate
    import jaxmoe.inspect
    import jaxmoe.run.loop
    import jaxmoe.train  # noqa: F401


def _child(
    arguments: list[str], folder: Path, out: Path, err: Path, before: Callable[[], None] | None
) -> None:
    code = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY), number)
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if before is not None:
            before()
        from jaxmoe import cli

        try:
            cli._end(cli.main(arguments))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            _end_threads()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_threads() -> None:
    """What the interpreter does at its end, which a fork never comes to."""
    import threading

    threading._shutdown()


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0
