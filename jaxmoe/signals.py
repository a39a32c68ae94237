"""How SIGINT and SIGTERM end a program: soon, without a traceback, and after it has cleaned up."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""What is said of each."""

AGAIN_SECONDS = 0.1


class _Interrupt(KeyboardInterrupt):
    """What a signal raises. Dropped anywhere, it says so."""

    def __init__(self, dropped: Callable[[], None]) -> None:
        super().__init__()
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped()


_deferring = 0


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """For what a library must not be interrupted in: the first signal comes when it is done. The next comes at once."""
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


class Signals:
    """While a command runs: SIGINT and SIGTERM raise KeyboardInterrupt in it, until one of them has ended it.

    Python runs a handler between any two instructions of the main thread. If those are of a finalizer or of a
    callback of the garbage collector, of which jax has one, the exception ends there; a library's bare ``except``
    and a callback from C++ do as much. The signal then comes again a little later. So it does in place of raising
    in an import, because modules in C crash of that. While the exception is on its way, on the other hand, nothing
    disturbs what it makes the command clean up.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._ended = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for number in _taken():
            self._handlers[number] = signal.signal(number, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        sys.unraisablehook = self._hook
        if signal.SIGALRM in self._handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def ended_by(self, error: BaseException) -> signal.Signals | None:
        """The signal that ended the command, whatever became of its exception; from now on none is heeded."""
        self._ended = True
        return self._received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            return
        first = self._received is None or number == signal.SIGALRM
        if number != signal.SIGALRM:
            self._received = signal.Signals(number)
        if signal.SIGALRM not in self._handlers:
            self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
        if _importing(frame) or (_deferring and first):
            self._again()
        else:
            raise _Interrupt(self._again)  # without a name here: its traceback would keep it alive for good

    def _again(self) -> None:
        if not self._ended:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    def _unraisable(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, _Interrupt):
            self._hook(unraisable)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _taken() -> list[signal.Signals]:
    """The signals to take: Python lets only the main thread do so, and what the parent ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in ENDINGS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
