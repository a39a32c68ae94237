"""Rows of Arrow's IPC files and streams, the latter of which the datasets library saves to disk."""

import os
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmoe.block_cache import BlockCache
from jaxmoe.chat.row_files import PLACES, Stamp, blake2b_16, changed, not_there_any_more
from jaxmoe.errors import UserError, first_line, quote
from jaxmoe.files import open_regular
from jaxmoe.json_lines import not_utf8

_MAGIC = b"ARROW1"
_MOST_DECOMPRESSED = 2**28
_BATCH_BITS = 32  # of ``start``, which has the batch above them and the row in it below


class ArrowFile:
    """One row of a table, one row: all columns, without the keys of nested objects that are null.

    The file is mapped: of a record batch no more is read than the rows that are asked for, and what was read the
    system can drop again. One that is compressed is decoded as a whole and kept in the cache.

    Args:
        path: the file.
        cache: of record batches, shared with other files.
        shown: how messages call the file; None for its path.
        digest: of what the file was made of; None for that of its bytes.
    """

    def __init__(
        self, path: Path, cache: BlockCache[pa.RecordBatch], shown: str | None = None, digest: bytes = b""
    ):
        self.path = path
        self.digest = digest
        self._cache = cache
        self._shown = str(path) if shown is None else shown
        self._stamp = Stamp(0, 0)
        self._source: pa.MemoryMappedFile | None = None
        self._schema: pa.Schema | None = None
        self._offsets: list[int] | None = None  # of the batches of a stream

    def scan(self) -> np.ndarray:
        with open_regular(self.path) as file:
            self._stamp = Stamp.of(os.fstat(file.fileno()))
            if not self.digest:
                self.digest = file_digest(file, blake2b_16).digest()
        try:
            counts = [batch.num_rows for batch in self._checked(self._batches())]
        except (pa.ArrowException, OSError, EOFError) as error:
            raise UserError(
                f"{self._shown}: not readable as an Arrow file or stream ({first_line(error)}); copy or write it again"
            ) from None
        found = np.zeros(sum(counts), PLACES)
        found["place"] = np.arange(len(found))
        found["length"] = min(self._stamp.size // max(len(found), 1), 2**32 - 1)
        if counts:
            starts = [np.arange(count) + (batch << _BATCH_BITS) for batch, count in enumerate(counts)]
            found["start"] = np.concatenate(starts)
        return found

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as source:
            if source.read(len(_MAGIC)) == _MAGIC:
                reader = pa.ipc.open_file(source)
                self._check_schema(reader.schema)
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)
                return
            source.seek(0)
            self._schema = pa.ipc.read_schema(pa.ipc.read_message(source))
            self._check_schema(self._schema)
            self._offsets = []
            while True:
                offset = source.tell()
                try:
                    message = pa.ipc.read_message(source)
                except EOFError:
                    return
                if message.type != "record batch":
                    raise UserError(
                        f"{self._shown}: a stream with columns of categories, expected plain ones, of which a batch "
                        "can be read without those before it; write it as .parquet"
                    )
                self._offsets.append(offset)
                yield pa.ipc.read_record_batch(message, self._schema)

    def _checked(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The same, of batches that have a size as if nothing was compressed that memory can have."""
        before = pa.total_allocated_bytes()
        for batch in batches:
            taken = pa.total_allocated_bytes() - before
            if taken > _MOST_DECOMPRESSED:
                raise UserError(
                    f"{self._shown}: a record batch of {taken:,} bytes that is compressed, expected at most "
                    f"{_MOST_DECOMPRESSED:,}; write it uncompressed or with fewer rows in a batch"
                )
            yield batch
            del batch
            before = pa.total_allocated_bytes()

    def _check_schema(self, schema: pa.Schema) -> None:
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise UserError(
                    f"{self._shown}: {schema.names.count(name)} columns are named {quote(name)}, expected one; rename "
                    "the others"
                )

    def read(self, start: int, place: int, length: int) -> dict[str, Any]:  # noqa: ARG002 - only lines need it
        where = self.where(place)
        number, row = divmod(start, 1 << _BATCH_BITS)
        try:
            if Stamp.of(self.path.stat()) != self._stamp:
                raise changed(where)
            batch = self._cache.get((self.path, number), lambda: self._batch(number))
            values = batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise not_utf8(error, where, 0) from None
        except OSError as error:
            raise not_there_any_more(where, error) from None
        except (
            pa.ArrowException,
            ValueError,
            ImportError,
        ) as error:  # such as dates that Python does not have
            raise UserError(
                f"{where}: a value that cannot be read ({first_line(error)}); leave its column out"
            ) from None
        return {name: _without_nulls(value) for name, value in values.items()}

    def _batch(self, number: int) -> pa.RecordBatch:
        """One batch; the cache sees to it that one thread asks at a time."""
        if self._source is None:
            self._source = pa.memory_map(
                str(self.path)
            )  # once, since there may be as many batches as may be mapped
        if self._offsets is None:
            return pa.ipc.open_file(self._source).get_batch(number)
        self._source.seek(self._offsets[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._source), self._schema)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def where(self, place: int) -> str:
        return f"{self._shown} row {place}"


def _without_nulls(value: Any) -> Any:
    """A value without the keys of objects in it that are null: in a table each has the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
