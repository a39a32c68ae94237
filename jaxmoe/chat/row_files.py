"""Files of rows: a pass that finds where each row lies, and one row at a place that it found.

A file that is not what it was in that pass, by its size and the time of its last change, is noticed whenever a row of
it is read.
"""

import json
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.files import open_regular
from jaxmoe.json_lines import BYTE_ORDER_MARK, half_surrogate, parse_object, too_long

PLACES = np.dtype([("file", "<u4"), ("length", "<u4"), ("place", "<u4"), ("start", "<i8")])
"""Where a row lies, in 20 bytes: which file, how many bytes it has there, its line or number, what the file reads."""

MOST_RECORD_BYTES = 2**31
"""What may be allowed of one row, so that its length fits."""

CHUNK_BYTES = 2**20

_NOT_BLANK = re.compile(rb"\S")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def blake2b_16() -> "blake2b":
    """A hash of 16 bytes, to be given the content of a file."""
    return blake2b(digest_size=16)


class Stamp(NamedTuple):
    """What a file cannot lose without a change."""

    size: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        return cls(found.st_size, found.st_mtime_ns)


def changed(where: str) -> UserError:
    """What to say of a file that is not what it was."""
    return UserError(f"{where}: changed since it was opened; restore it or start the run again")


def not_there_any_more(where: str, error: OSError) -> UserError:
    """What to say of a file that could be read before."""
    return UserError(f"{where}: cannot be read any more ({error.strerror or error}); restore the file")


class RowFile(Protocol):
    """A file whose rows are read one by one, from several threads, in this process or one that it was sent to."""

    digest: bytes
    """Of the content, once it was scanned."""

    def scan(self) -> np.ndarray:
        """``PLACES`` of its rows, their file left at 0.

        Raises:
            UserError: something in it is beyond what is read.
            OSError: it cannot be read.
        """

    def read(self, start: int, place: int, length: int) -> dict[str, Any]:
        """The row at a place.

        Raises:
            UserError: the row is none, or the file changed; the message says where.
        """

    def where(self, place: int) -> str:
        """The file and the line or row in it, for messages."""


class JsonlFile:
    """One line, one JSON object. Blank lines are passed over. JSON is not parsed before a row is read.

    Args:
        path: the file.
        max_record_bytes: the longest line that is read.
        shown: how messages call the file; None for its path.
        rows: whether messages count rows, from 0, in place of lines.
    """

    def __init__(self, path: Path, max_record_bytes: int, shown: str | None = None, rows: bool = False):
        self.path = path
        self.digest = b""
        self._most = max_record_bytes
        self._shown = str(path) if shown is None else shown
        self._rows = rows
        self._stamp = Stamp(0, 0)

    def scan(self) -> np.ndarray:
        digest = blake2b_16()
        lines = _Lines(self)
        with open_regular(self.path) as file:
            self._stamp = Stamp.of(os.fstat(file.fileno()))
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                lines.add(chunk, file)
            lines.end()
            if Stamp.of(os.fstat(file.fileno())) != self._stamp:
                raise changed(self._shown)
        self.digest = digest.digest()
        return np.concatenate(lines.found) if lines.found else np.zeros(0, PLACES)

    def read(self, start: int, place: int, length: int) -> dict[str, Any]:
        where = self.where(place)
        try:
            with open_regular(self.path) as file:
                if Stamp.of(os.fstat(file.fileno())) != self._stamp:
                    raise changed(where)
                line = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise not_there_any_more(where, error) from None
        row = parse_object(line, where, start)
        if _SURROGATE.search(line):
            _refuse_surrogates(row, where)
        return row

    def where(self, place: int) -> str:
        return f"{self._shown} row {place - 1}" if self._rows else f"{self._shown} line {place}"

    def too_long(self, line: int) -> UserError:
        """What to say of a line that is longer than what is read."""
        return too_long(self.where(line), self._most, "shorten or remove it")

    @property
    def max_record_bytes(self) -> int:
        return self._most


class _Lines:
    """Where lines begin and end, of a file that is given chunk by chunk."""

    def __init__(self, file: JsonlFile):
        self.found: list[np.ndarray] = []
        self._file = file
        self._most = file.max_record_bytes
        self._offset = 0  # of the next chunk
        # Of the line that is not ended yet:
        self._begin = 0
        self._number = 1
        self._blank = True

    def add(self, chunk: bytes, file: IO[bytes]) -> None:
        offset = self._offset
        self._offset += len(chunk)
        if offset == 0 and chunk.startswith(BYTE_ORDER_MARK):
            self._begin = len(BYTE_ORDER_MARK)
        values = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(values == ord("\n")) + (offset + 1)
        if len(ends):
            begins = np.concatenate([[self._begin], ends[:-1]])
            self._refuse_long(begins, ends, file)
            self._keep(begins, ends, self._is_blank(begins, ends, chunk, offset))
            self._begin, self._number, self._blank = int(ends[-1]), self._number + len(ends), True
        if self._offset - self._begin > self._most + 1:  # a carriage return may come before its end
            raise self._file.too_long(self._number)
        self._blank = self._blank and not _NOT_BLANK.search(chunk, max(self._begin - offset, 0))

    def end(self) -> None:
        """Take what follows the last line end as a line."""
        if self._offset - self._begin > self._most:
            raise self._file.too_long(self._number)
        if self._offset > self._begin:
            self._keep(np.array([self._begin]), np.array([self._offset]), np.array([self._blank]))

    def _is_blank(self, begins: np.ndarray, ends: np.ndarray, chunk: bytes, offset: int) -> np.ndarray:
        """(n,): whether lines that end in this chunk have white space only."""
        blank = np.zeros(len(ends), bool)
        blank[0] = self._blank and not _NOT_BLANK.search(
            chunk, max(self._begin - offset, 0), ends[0] - offset
        )
        values = np.frombuffer(chunk, np.uint8)
        # Few lines begin with white space: the others need no look.
        for i in np.flatnonzero(values[begins[1:] - offset] <= ord(" ")) + 1:
            blank[i] = not _NOT_BLANK.search(chunk, begins[i] - offset, ends[i] - offset)
        return blank

    def _refuse_long(self, begins: np.ndarray, ends: np.ndarray, file: IO[bytes]) -> None:
        for i in np.flatnonzero(ends - begins - 1 > self._most):
            carriage_return = os.pread(file.fileno(), 1, int(ends[i]) - 2) == b"\r"
            if ends[i] - begins[i] - 1 - carriage_return > self._most:
                raise self._file.too_long(self._number + int(i))

    def _keep(self, begins: np.ndarray, ends: np.ndarray, blank: np.ndarray) -> None:
        found = np.zeros(len(ends), PLACES)
        found["start"], found["length"] = begins, ends - begins
        found["place"] = self._number + np.arange(len(ends))
        self.found.append(found[~blank])


def _refuse_surrogates(row: dict[str, Any], where: str) -> None:
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode()
        except RecursionError:
            raise UserError(f"{where}: objects in objects too deep to be read; remove the row") from None
        except UnicodeEncodeError:
            raise half_surrogate(f"{where}: field {field!r}") from None
