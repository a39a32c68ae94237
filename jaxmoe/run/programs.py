"""A run's programs, compiled in the background while its documents are read and its tokenizer is made."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from jaxmoe.run.assemble import Assembled
from jaxmoe.training.step import TrainStep


class Programs:
    """What a run compiles before its first step. XLA compiles without the interpreter's lock.

    A thread cannot be stopped: a command that ends before its step is compiled says why at once, and the process
    follows a little later (`jaxmoe.cli`).

    Attributes:
        begun: when this was made, on the clock of `time.perf_counter`.
    """

    def __init__(self, assembled: Assembled) -> None:
        self.begun = time.perf_counter()
        self._assembled = assembled
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self._step: Future[TrainStep] | None = None

    def __enter__(self) -> "Programs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False)

    def begin(self) -> None:
        """Begin to compile the training step, which takes the longest."""
        self._step = self._pool.submit(lambda: TrainStep(self._assembled.lower().compile()))

    def train_step(self) -> TrainStep:
        """The compiled training step, waited for.

        Raises:
            Exception: what compiling raised.
        """
        if self._step is None:
            self.begin()
        assert self._step is not None
        return self._step.result()
