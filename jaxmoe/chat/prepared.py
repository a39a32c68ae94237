"""A source's examples on disk: made once, and read by any run with the same rows, template and tokenizer."""

import collections
import dataclasses
import json
import os
import shutil
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.chat.encoder import Example
from jaxmoe.chat.workers import Workers, arrays
from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, lock, partial, sync

_IDS, _WEIGHTS, _PLACES, _ABOUT = "ids.bin", "weights.bin", "places.npz", "about.json"
_MOST_ERRORS = 20


@dataclasses.dataclass(frozen=True)
class About:
    """What a preparation found.

    Attributes:
        rows: that were read.
        examples: that they gave.
        tokens: of these.
        trained: tokens with a weight.
        bad: rows that cannot be used.
        errors: what is wrong with the first of them.
        notes: what was left out, cut, or not as one would expect, and how often.
    """

    rows: int
    examples: int
    tokens: int
    trained: int
    bad: int
    errors: tuple[str, ...]
    notes: dict[str, int]


class Prepared:
    """Examples of rows in a folder, mapped into memory; safe to be read from several threads.

    Attributes:
        about: what they are.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        self.about = About(**{**about, "errors": tuple(about["errors"])})
        places = np.load(folder / _PLACES, allow_pickle=False)
        self._first, self._begin = places["first"], places["begin"]
        self._ids = _mapped(folder / _IDS, np.int32, self.about.tokens)
        self._weights = _mapped(folder / _WEIGHTS, np.float32, self.about.tokens)

    def __len__(self) -> int:
        return self.about.rows

    def __getitem__(self, i: int) -> list[Example]:
        return [self._example(number) for number in range(self._first[i], self._first[i + 1])]

    def _example(self, number: int) -> Example:
        where = slice(self._begin[number], self._begin[number + 1])
        return Example(self._ids[where], self._weights[where])

    def lengths(self) -> np.ndarray:
        """(E,) int64: tokens of each example."""
        return np.diff(self._begin)


def prepare(
    workers: Workers,
    source: int,
    folder: Path,
    *,
    skip: bool,
    progress: Callable[[int], Any],
) -> Prepared:
    """The examples of a source, read from ``folder`` if they are there already.

    Args:
        workers: that encode.
        source: its number.
        folder: named after all that its content depends on.
        skip: leave rows out that cannot be used, instead of stopping at the first.
        progress: told how many rows are done.

    Raises:
        UserError: a row cannot be used; none can; the folder cannot be written.
    """
    # Runs that begin together would otherwise all make it. Who waits finds it made.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock(folder.with_name(f"{folder.name}.lock"), str(folder), wait=True)
    except OSError as error:
        raise cannot_write(f"data.cache: {folder}: cannot write prepared data", error) from error
    try:
        if not folder.exists():
            _make(workers, source, folder, progress, skip)
        prepared = Prepared(folder)
    finally:
        os.close(held)
    if prepared.about.bad and not skip:
        raise UserError(prepared.about.errors[0])
    return prepared


def _make(workers: Workers, source: int, folder: Path, progress: Callable[[int], Any], skip: bool) -> None:
    unfinished = partial(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        about = _write(workers, source, unfinished, progress, skip)
        (unfinished / _ABOUT).write_text(json.dumps(dataclasses.asdict(about)), "utf-8")
        unfinished.rename(folder)
    except OSError as error:
        raise cannot_write(f"{folder}: cannot write prepared data", error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(workers: Workers, source: int, folder: Path, progress: Callable[[int], Any], skip: bool) -> About:
    first, begin = array("q", [0]), array("q", [0])
    errors: list[str] = []
    notes: collections.Counter[str] = collections.Counter()
    bad = rows = trained = 0
    with (folder / _IDS).open("wb") as ids_file, (folder / _WEIGHTS).open("wb") as weights_file:
        for encoded in workers.all(source):
            if encoded.errors and not skip:
                raise UserError(encoded.errors[0])
            lengths, ids, weights = arrays(encoded.examples)
            ids_file.write(ids.tobytes())
            weights_file.write(weights.tobytes())
            first.extend((first[-1] + np.cumsum(encoded.counts)).tolist())
            begin.extend((begin[-1] + np.cumsum(lengths)).tolist())
            trained += int(np.count_nonzero(weights))
            rows += len(encoded.counts)
            bad += len(encoded.errors)
            errors += encoded.errors[: _MOST_ERRORS - len(errors)]
            notes.update(encoded.notes)
            progress(rows)
        sync(ids_file)
        sync(weights_file)
    np.savez(folder / _PLACES, first=np.array(first, np.int64), begin=np.array(begin, np.int64))
    return About(rows, len(begin) - 1, begin[-1], trained, bad, tuple(errors), dict(notes))


def _mapped(file: Path, dtype: Any, count: int) -> np.ndarray:
    if not count:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r", shape=(count,))
