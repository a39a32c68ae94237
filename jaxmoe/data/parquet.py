"""The reader of parquet files, which are decoded some rows at a time however much they decompress to."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmoe.block_cache import BlockCache
from jaxmoe.data.formats import Found, found_whole
from jaxmoe.errors import UserError, available, first_line
from jaxmoe.files import open_regular
from jaxmoe.json_lines import MAX_RECORD_BYTES, not_utf8

_BLOCK_BYTES = 2**25
"""A row group with more text than this is held in several blocks."""

# Few, because a batch is dense however well its rows compress, and each may have as much as is allowed of one.
_BATCH_ROWS = 16
# Once their sizes are known, as many as have about so many bytes: short texts are then read three times as fast.
_BATCH_BYTES = 2**20
_MOST_BATCH_ROWS = 2**10
_STREAM_BYTES = 2**20


class ParquetReader:
    """One row, one document, in the string column ``field``."""

    def __init__(
        self, path: Path, field: str, cache: BlockCache[pa.Array], max_record_bytes: int = MAX_RECORD_BYTES
    ):
        self.path = path
        self.field = field
        self._cache = cache
        self._most = max_record_bytes
        self._starts: list[list[int]] = []  # per row group, the first row of each block
        self._batch_rows: list[int] = []  # per row group

    def scan(self) -> Iterator[Found]:
        row = 0
        self._starts, self._batch_rows = [], []
        for group in range(self._check()):
            starts, in_group, filled, total, largest = [0], 0, 0, 0, 0
            self._starts.append(starts)
            for batch in self._batches(group, _BATCH_ROWS):
                for value in batch:
                    content = self._content(value.as_py(), self.where(row))
                    if filled and filled + len(content) > _BLOCK_BYTES:
                        starts.append(in_group)
                        filled = 0
                    filled += len(content)
                    total += len(content)
                    largest = max(largest, len(content))
                    yield found_whole(group, in_group, row, content)
                    row += 1
                    in_group += 1
            # However they are mixed, a batch has no more bytes than one of the scan may have.
            by_mean = _BATCH_BYTES * in_group // max(total, 1)
            rows = min(by_mean, _BATCH_ROWS * self._most // max(largest, 1), _MOST_BATCH_ROWS)
            self._batch_rows.append(max(rows, _BATCH_ROWS))

    def _content(self, value: bytes | None, where: str) -> bytes:
        if value is None:
            raise UserError(f"{where}: column {self.field!r} is null, expected a string")
        if len(value) > self._most:
            raise UserError(
                f"{where}: a text of {len(value):,} bytes, expected at most {self._most:,}; "
                "split it, write it as .txt, or raise the data's max_record_bytes"
            )
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(error, where, 0) from None
        return value

    def _check(self) -> int:
        """The number of row groups of a file whose column is there and holds strings of a plausible length."""
        with open_regular(self.path):  # Arrow would wait for a pipe
            pass
        try:
            with pq.ParquetFile(self.path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except pa.ArrowException as error:
            raise UserError(f"{self.path}: not a readable parquet file ({first_line(error)})") from None
        there = schema.names.count(self.field)
        if not there:
            raise UserError(
                f"{self.path}: no column {self.field!r}; {available(self.field, schema.names)}; set the data's field"
            )
        if there > 1:
            raise UserError(
                f"{self.path}: {there} columns are named {self.field!r}, expected one; rename the others"
            )
        kind = schema.field(self.field).type
        value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
        if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
            raise UserError(f"{self.path}: column {self.field!r} holds {kind}, expected strings")
        for group in range(metadata.num_row_groups):
            self._check_mean(metadata.row_group(group), group)
        return metadata.num_row_groups

    def _check_mean(self, group: pq.RowGroupMetaData, number: int) -> None:
        """Where the mean is too long one text is: found without decompressing it."""
        chunks = [group.column(i) for i in range(group.num_columns)]
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema == self.field)
        if chunk.total_uncompressed_size > 2 * self._most * max(chunk.num_values, 1):
            raise UserError(
                f"{self.path} row group {number}: {chunk.total_uncompressed_size:,} bytes in {chunk.num_values:,} "
                f"rows of column {self.field!r}, expected at most {self._most:,} in each; split the texts, write them "
                "as .txt, or raise the data's max_record_bytes"
            )

    def _batches(self, group: int, rows: int) -> Iterator[pa.Array]:
        """The column of one row group, some rows at a time, as bytes: of UTF-8 Arrow does not say where it is none."""
        try:
            with pq.ParquetFile(self.path, buffer_size=_STREAM_BYTES, pre_buffer=False) as file:
                batches = file.iter_batches(rows, row_groups=[group], columns=[self.field], use_threads=False)
                for batch in batches:
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    yield column.cast(pa.large_binary())
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} row group {group}: not readable ({first_line(error)}); copy the file again"
            ) from None

    def block(self, group: int, number: int) -> pa.Array:
        """The rows of one block, large_binary."""
        starts = [*self._starts[group], None]
        first, end = starts[number], starts[number + 1]
        assert first is not None
        rows, row = [], 0
        for batch in self._batches(group, self._batch_rows[group]):
            if end is not None and row >= end:
                break
            if row + len(batch) > first:
                rows.append(batch[max(0, first - row) : None if end is None else end - row])
            row += len(batch)
        if len(rows) == 1:  # a copy, because a slice keeps all that it was cut from
            return pa.array(rows[0].to_pylist(), pa.large_binary())
        return pa.concat_arrays(rows)

    def read(self, start: int, length: int, begin: int, end: int) -> bytes:
        number = bisect_right(self._starts[start], length) - 1
        block = self._cache.get((self.path, start, number), lambda: self.block(start, number))
        return block[length - self._starts[start][number]].as_py()[begin:end]

    def where(self, place: int) -> str:
        return f"{self.path} row {place}"
