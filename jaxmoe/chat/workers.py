"""Rows encoded, here or by worker processes."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np

from jaxmoe.chat.encoder import Encoder, Example
from jaxmoe.chat.formats import RecordReader
from jaxmoe.chat.rows import Rows
from jaxmoe.errors import UserError

_ROWS_AT_ONCE = 64
_CHUNKS_AHEAD = 3
"""So many per worker are asked for before the first of them is taken."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The rows of one source and how they become examples.

    Attributes:
        rows: as they are in files.
        reader: of their format.
        encoder: to tokens.
    """

    rows: Rows
    reader: RecordReader
    encoder: Encoder

    def encode(self, indices: Sequence[int]) -> "Encoded":
        """What the rows at ``indices`` give; a row that cannot be used is told of and gives nothing."""
        counts, examples, errors = [], [], []
        before = self.encoder.notes.copy()
        for i in indices:
            try:
                found = self.encoder(self.reader(self.rows[i], self.rows.where(i)))
            except UserError as error:
                found, told, where = [], str(error), self.rows.where(i)
                errors.append(told if told.startswith(where) else f"{where}: {told}")
            counts.append(len(found))
            examples += found
        return Encoded(counts, examples, errors, self.encoder.notes - before)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What some rows give.

    Attributes:
        counts: how many examples each row gives.
        examples: of all these rows, in order.
        errors: a line for each row that cannot be used, with its place.
        notes: see `Encoder.notes`.
    """

    counts: list[int]
    examples: list[Example]
    errors: list[str]
    notes: "collections.Counter[str]"


class Workers:
    """Encodes rows of several sources on worker processes, or here without any.

    Args:
        sources: sent to every worker once.
        count: of processes; 0 encodes in the thread that asks.
    """

    def __init__(self, sources: Sequence[Source], count: int):
        self._sources = tuple(sources)
        self.count = count
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def submit(self, source: int, indices: Sequence[int]) -> Callable[[], Encoded]:
        """Begin to encode some rows; what is returned waits for them."""
        if not self.count:
            return lambda: self._sources[source].encode(indices)
        if self._pool is None:
            # Not forked: this process has threads of jax, grain and tokenizers.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(pickle.dumps(self._sources),),
            )
        encoded = self._pool.submit(_encode, source, tuple(indices))

        def wait() -> Encoded:
            try:
                return encoded.result()
            except concurrent.futures.BrokenExecutor as error:
                raise UserError(
                    f"a process that tokenizes was ended from outside, expected it to live (has the system no memory "
                    f"left?): set data.workers to less than {self.count}, or 0"
                ) from error

        return wait

    def all(self, source: int) -> Iterator[Encoded]:
        """All rows of a source in order, some at a time."""
        total = len(self._sources[source].rows)
        waiting: collections.deque[Callable[[], Encoded]] = collections.deque()
        for first in range(0, total, _ROWS_AT_ONCE):
            waiting.append(self.submit(source, range(first, min(first + _ROWS_AT_ONCE, total))))
            if len(waiting) > _CHUNKS_AHEAD * self.count:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


_here: tuple[Source, ...] = ()


def _begin(pickled: bytes) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the process that asked ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here = pickle.loads(pickled)  # noqa: S301 - from the process that started this one


def _end_with_parent() -> None:
    """Of a parent that is killed nobody tells the processes that wait for its work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(source: int, indices: Sequence[int]) -> Encoded:
    return _here[source].encode(indices)


def arrays(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (E,) int64, ids (n,) int32 and weights (n,) float32 of examples, one after the other."""
    lengths = np.array([len(example.ids) for example in examples], np.int64)
    if not examples:
        return lengths, np.zeros(0, np.int32), np.zeros(0, np.float32)
    ids = np.concatenate([example.ids for example in examples])
    weights = np.concatenate([example.weights for example in examples])
    return lengths, ids, weights
