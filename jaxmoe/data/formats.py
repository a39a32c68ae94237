"""One reader per file format: a scan that checks the whole file, and the text at a place that it found.

A scan yields (start, length, place, text) per document. ``start`` and ``length`` are what ``read`` takes:
bytes of a text or jsonl file, (row group, row in it) of a parquet file. ``place`` is for messages: a line or
a row, counted as ``where`` prints it.
"""

import difflib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmoe.errors import UserError, first_line, listed

ROW_GROUP_CACHE_BYTES = 2**30
"""Decoded parquet text held in memory: a column beyond it is decoded again and again by shuffled reading."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Found = tuple[int, int, int, str]


class Reader(Protocol):
    """A data file: ``scan`` raises UserError for what is wrong in it, ``read`` returns one document."""

    path: Path

    def scan(self) -> Iterator[Found]: ...
    def read(self, start: int, length: int) -> str: ...
    def where(self, place: int) -> str: ...


def open_reader(path: Path, field: str, cache: "RowGroupCache") -> Reader:
    """The reader for the path's suffix; any suffix but .jsonl and .parquet is plain text."""
    match path.suffix.lower():
        case ".jsonl":
            return JsonlReader(path, field)
        case ".parquet":
            return ParquetReader(path, field, cache)
        case _:
            return TextReader(path)


class TextReader:
    """One file, one document, its line ends as they are."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Iterator[Found]:
        content = self.path.read_bytes()
        start = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
        yield start, len(content) - start, 0, _decode(content[start:], str(self.path), start)

    def read(self, start: int, length: int) -> str:
        return _read_bytes(self.path, start, length).decode()

    def where(self, place: int) -> str:  # noqa: ARG002 - a text file has one place
        return str(self.path)


class JsonlReader:
    """One line, one JSON object, the document in its string ``field``. Blank lines are passed over."""

    def __init__(self, path: Path, field: str):
        self.path = path
        self.field = field

    def scan(self) -> Iterator[Found]:
        offset = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                if line[mark:].strip():
                    text = self._document(line[mark:], number, offset + mark)
                    yield offset + mark, len(line) - mark, number, text
                offset += len(line)

    def _document(self, line: bytes, number: int, offset: int) -> str:
        where = self.where(number)
        source = _decode(line, where, offset)
        try:
            row = json.loads(source)
        except json.JSONDecodeError as error:
            at = offset + len(source[: error.pos].encode())
            raise UserError(
                f"{where}: not JSON ({error.msg} at byte {at}); expected one object per line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not readable as JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a JSON {_json_type(row)}, expected an object with a {self.field!r} field"
            )
        if self.field not in row:
            raise UserError(f"{where}: no field {self.field!r}; {_available(self.field, row)}")
        text = row[self.field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.field!r} is a JSON {_json_type(text)}, expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {self.field!r} holds half a surrogate pair at character {error.start}, "
                "which no UTF-8 text can; remove it"
            ) from None
        return text

    def read(self, start: int, length: int) -> str:
        return json.loads(_read_bytes(self.path, start, length))[self.field]

    def where(self, place: int) -> str:
        return f"{self.path} line {place}"


class RowGroupCache:
    """Decoded parquet columns, the least recently used dropped first; shared by all readers and threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def get(self, reader: "ParquetReader", group: int) -> pa.Array:
        key = (reader.path, group)
        with self._lock:
            if key not in self._groups:
                column = reader.row_group(group)
                self._groups[key] = column
                self._bytes += column.nbytes
                while self._bytes > ROW_GROUP_CACHE_BYTES and len(self._groups) > 1:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups.move_to_end(key)
            return self._groups[key]


class ParquetReader:
    """One row, one document, in the string column ``field``."""

    def __init__(self, path: Path, field: str, cache: RowGroupCache):
        self.path = path
        self.field = field
        self._cache = cache

    def scan(self) -> Iterator[Found]:
        row = 0
        for group in range(self._check()):
            for in_group, value in enumerate(self.row_group(group).to_pylist()):
                where = self.where(row)
                if value is None:
                    raise UserError(f"{where}: column {self.field!r} is null, expected a string")
                yield group, in_group, row, _decode(value, where, 0)
                row += 1

    def _check(self) -> int:
        """The number of row groups of a file whose column is there and holds strings."""
        try:
            with pq.ParquetFile(self.path) as file:
                schema, groups = file.schema_arrow, file.num_row_groups
        except pa.ArrowException as error:
            raise UserError(f"{self.path}: not a readable parquet file ({first_line(error)})") from None
        if self.field not in schema.names:
            raise UserError(f"{self.path}: no column {self.field!r}; {_available(self.field, schema.names)}")
        kind = schema.field(self.field).type
        value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
        if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
            raise UserError(f"{self.path}: column {self.field!r} holds {kind}, expected strings")
        return groups

    def row_group(self, group: int) -> pa.Array:
        """The column of one row group as bytes: Arrow decodes UTF-8 without saying where it fails."""
        try:
            with pq.ParquetFile(self.path) as file:
                column = file.read_row_group(group, columns=[self.field]).column(self.field)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} row group {group}: not readable ({first_line(error)}); copy the file again"
            ) from None
        if pa.types.is_dictionary(column.type):
            column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks])
        chunks = [chunk.cast(pa.large_binary()) for chunk in column.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_binary())

    def read(self, start: int, length: int) -> str:
        return self._cache.get(self, start)[length].as_py().decode()

    def where(self, place: int) -> str:
        return f"{self.path} row {place}"


def _read_bytes(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _decode(content: bytes, where: str, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{content[error.start]:02x} at offset {offset + error.start} is not UTF-8; "
            "convert the file to UTF-8 (iconv -f ENCODING -t UTF-8) or leave it out"
        ) from None


def _available(field: str, names: Collection[str]) -> str:
    nearest = difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}it has {listed([*map(repr, names)], 8) or 'none'}; set the data's field"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds[type(value)]
