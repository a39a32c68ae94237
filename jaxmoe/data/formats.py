"""Readers of text and of JSON lines: a scan that checks the whole file, and the text at a place that it found.

Readers of every format give ``Found`` per document. ``start`` and ``length`` are what ``read`` takes: bytes of a
text or jsonl file, (row group, row in it) of a parquet file. ``place`` is for messages: a line or a row, counted
as ``where`` prints it.

A document beyond ``WHOLE_BYTES`` is handled in parts of ``PART_BYTES``, so that memory does not grow with it.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from jaxmoe.errors import UserError, available
from jaxmoe.files import open_regular
from jaxmoe.json_lines import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    half_surrogate,
    json_type,
    not_utf8,
    parse_object,
    too_long,
)

WHOLE_BYTES = 2**24
"""A document of at most so many bytes of UTF-8 is one element of the data."""

PART_BYTES = 2**19
"""A larger one is as many elements as it has parts of this size."""


class Found(NamedTuple):
    """A document that a scan came upon, before the next one is asked for."""

    start: int
    length: int
    place: int
    size: int  # bytes of its text in UTF-8
    contents: Iterable[bytes]  # that text, checked to be UTF-8, part by part


class Reader(Protocol):
    """A data file: ``scan`` raises UserError for what is wrong in it, ``read`` returns bytes of one document."""

    path: Path

    def scan(self) -> Iterator[Found]: ...
    def read(self, start: int, length: int, begin: int, end: int) -> bytes: ...
    def where(self, place: int) -> str: ...


def part_begins(size: int) -> range:
    """Where each part of a document of ``size`` bytes begins. The last one has up to twice as much as the others."""
    return range(0, 1) if size <= WHOLE_BYTES else range(0, size - PART_BYTES + 1, PART_BYTES)


def part_of(size: int, number: int) -> tuple[int, int]:
    """Begin and end of one of these parts."""
    begins = part_begins(size)
    return begins[number], size if number == len(begins) - 1 else begins[number + 1]


def found_whole(start: int, length: int, place: int, content: bytes) -> Found:
    """A document that is in memory."""
    size = len(content)
    begins = part_begins(size)
    if len(begins) == 1:
        return Found(start, length, place, size, [content])
    parts = (content[slice(*part_of(size, number))] for number in range(len(begins)))
    return Found(start, length, place, size, parts)


class TextReader:
    """One file, one document, its line ends as they are."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Iterator[Found]:
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            start = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
            file.seek(start)
            size -= start
            yield Found(start, size, 0, size, self._parts(file, start, size))

    def _parts(self, file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for number in range(len(part_begins(size))):
            done, end = part_of(size, number)
            content = file.read(end - done)
            if len(content) < end - done:
                raise UserError(f"{self.path}: changed while it was read; start the run again")
            carried = len(decoder.getstate()[0])
            try:
                decoder.decode(content, final=end == size)
            except UnicodeDecodeError as error:
                raise not_utf8(error, str(self.path), start + done - carried) from None
            yield content

    def read(self, start: int, length: int, begin: int, end: int) -> bytes:  # noqa: ARG002 - only jsonl needs it
        return _read_range(self.path, start + begin, end - begin)

    def where(self, place: int) -> str:  # noqa: ARG002 - a text file has one place
        return str(self.path)


class JsonlReader:
    """One line, one JSON object, the document in its string ``field``. Blank lines are passed over."""

    def __init__(self, path: Path, field: str, max_record_bytes: int = MAX_RECORD_BYTES):
        self.path = path
        self.field = field
        self._most = max_record_bytes

    def scan(self) -> Iterator[Found]:
        offset, number = 0, 0
        with open_regular(self.path) as lines:
            while line := lines.readline(self._most + 2):  # with a line end, which does not count
                number += 1
                if len(line.rstrip(b"\r\n")) > self._most:
                    raise too_long(self.where(number), self._most, "split its text, write it as .txt")
                mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
                if line[mark:].strip():
                    content = self._document(line[mark:], number, offset + mark)
                    yield found_whole(offset + mark, len(line) - mark, number, content)
                offset += len(line)

    def _document(self, line: bytes, number: int, offset: int) -> bytes:
        where = self.where(number)
        row = parse_object(line, where, offset, f"an object with a {self.field!r} field")
        if self.field not in row:
            raise UserError(
                f"{where}: no field {self.field!r}; {available(self.field, row)}; set the data's field"
            )
        text = row[self.field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.field!r} is a JSON {json_type(text)}, expected a string")
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise half_surrogate(f"{where}: field {self.field!r}", error.start) from None

    def read(self, start: int, length: int, begin: int, end: int) -> bytes:
        return json.loads(_read_range(self.path, start, length))[self.field].encode()[begin:end]

    def where(self, place: int) -> str:
        return f"{self.path} line {place}"


def _read_range(path: Path, start: int, length: int) -> bytes:
    with open_regular(path) as file:
        file.seek(start)
        return file.read(length)
