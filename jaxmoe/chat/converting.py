"""Files whose rows cannot be read one by one, rewritten once into a folder so that they can.

What is written has the name of a hash of the content that it was made of, and is found by that later.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmoe.chat.json_arrays import array_of_rows
from jaxmoe.chat.row_files import CHUNK_BYTES, blake2b_16
from jaxmoe.errors import UserError, first_line
from jaxmoe.files import cannot_write, check_room, open_regular, partial, sync, sync_folder
from jaxmoe.json_lines import parse_object, too_long

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BATCH_BYTES = 2**20
_MOST_BATCH_ROWS = 2**10
_MOST_BATCH_BYTES = 2**28
_STREAM_BYTES = 2**20


def has_lines(path: Path, most: int) -> bool:
    """Whether a .json file is one of JSON lines: an object fills its first line, and more lines follow."""
    content = b""
    for chunk in chunks(path):
        content = (content + chunk).lstrip(b"\xef\xbb\xbf \t\r\n")
        line, end, rest = content.partition(b"\n")
        if content and not content.startswith(b"{"):
            return False
        if len(line) > most:
            return False
        if end and (rest.strip() or not _is_object(line)):
            return _is_object(line)
    return False


def _is_object(line: bytes) -> bool:
    try:
        parse_object(line, "", 0)
    except UserError:
        return False
    return True


def chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, decompressed where its suffix says so.

    Raises:
        UserError: it cannot be.
    """
    with open_regular(path) as file:
        codec = _CODECS.get(path.suffix.lower())
        try:
            source = file if codec is None else pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not readable ({first_line(error)}); copy or write it again") from None


def as_lines(path: Path, cache: Path, most: int) -> Path:
    """Lines decompressed. One that is too long is not written.

    Raises:
        UserError: one is, the file cannot be read, or the folder not written.
    """

    def write(file: IO[bytes]) -> None:
        number, length = 1, 0
        for chunk in chunks(path):
            end = chunk.rfind(b"\n")
            if end < 0:
                length += len(chunk)
            else:
                number, length = number + chunk.count(b"\n"), len(chunk) - end - 1
            if length > most + 1:  # what ends in this chunk is looked at when the lines are found
                raise too_long(f"{path} line {number}", most, "shorten or remove it")
            file.write(chunk)

    return _in_cache(path, cache, "lines", ".jsonl", write)


def array_as_lines(path: Path, cache: Path, most: int) -> Path:
    """The array of a .json file, one element in a line.

    Raises:
        UserError: there is none, the file cannot be read, or the folder not written.
    """

    def write(file: IO[bytes]) -> None:
        for row in array_of_rows(chunks(path), str(path), most):
            file.write(row.encode() + b"\n")

    return _in_cache(path, cache, "array", ".jsonl", write)


def parquet_as_arrow(path: Path, cache: Path) -> tuple[Path, bytes]:
    """A .parquet file's rows in small record batches: a row of parquet costs the decoding of its row group.

    Returns:
        The file, and a digest of what it was made of.

    Raises:
        UserError: the file cannot be read, or the folder not written.
    """

    def write(file: IO[bytes]) -> None:
        try:
            with pq.ParquetFile(path, buffer_size=_STREAM_BYTES, pre_buffer=False) as source:
                groups = [source.metadata.row_group(i) for i in range(source.metadata.num_row_groups)]
                size = sum(group.total_byte_size for group in groups)
                rows = _BATCH_BYTES * source.metadata.num_rows // max(size, 1)
                rows = min(max(rows, 1), _MOST_BATCH_ROWS)
                check_room(cache, size)
                _write_batches(source, rows, file, str(path))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the system, when it writes
                raise
            raise UserError(f"{path}: not readable as parquet ({first_line(error)}); copy it again") from None

    target = _in_cache(path, cache, "parquet", ".arrow", write)
    return target, target.stem.encode()


def _write_batches(source: pq.ParquetFile, rows: int, file: IO[bytes], shown: str) -> None:
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in source.schema_arrow
    ]
    schema = pa.schema(fields)
    with pa.ipc.new_file(file, schema) as sink:
        for batch in source.iter_batches(rows, use_threads=False):
            if batch.nbytes > _MOST_BATCH_BYTES:
                raise UserError(
                    f"{shown}: {batch.nbytes:,} bytes in {batch.num_rows} rows, expected at most "
                    f"{_MOST_BATCH_BYTES:,}; split the rows, or write them as .jsonl"
                )
            columns = [
                column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                for column in batch.columns
            ]
            sink.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def _in_cache(path: Path, cache: Path, kind: str, suffix: str, write: Callable[[IO[bytes]], None]) -> Path:
    """The file in the cache that is made of another one, written unless it is there."""
    with open_regular(path) as source:
        digest = file_digest(source, blake2b_16).hexdigest()
    name = (
        f".{kind}-{digest}"  # hidden, so that none is taken for data where the cache is in the data's folder
    )
    target = cache / f"{name}{suffix}"
    if target.exists():
        return target
    unfinished = partial(
        cache / f"{kind}-{digest}-{uuid.uuid4().hex}{suffix}"
    )  # another process may write it too
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            write(file)
            sync(file)
        if not target.exists():  # who has opened it would take another one for a change
            unfinished.replace(target)
        sync_folder(cache)
    except OSError as error:
        raise cannot_write(f"{cache}: cannot write the rows of {path}", error) from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target
