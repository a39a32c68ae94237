"""Rows of data files by their number, as Python's dicts, whatever the files' kind."""

import operator
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import RecordBatch

from jaxmoe.block_cache import BlockCache
from jaxmoe.chat.arrow_file import ArrowFile
from jaxmoe.chat.converting import array_as_lines, as_lines, has_lines, parquet_as_arrow
from jaxmoe.chat.finding import find_row_files
from jaxmoe.chat.row_files import MOST_RECORD_BYTES, PLACES, JsonlFile, RowFile
from jaxmoe.errors import UserError
from jaxmoe.json_lines import MAX_RECORD_BYTES


class Rows:
    """Rows in files, each read when it is asked for; safe to read from several threads, and to send to processes.

    It is a random-access source as grain wants it, of 20 bytes per row. ``rows[i]`` raises UserError where that row
    is none, which says nothing of the others: whoever reads may count it and leave it out.
    """

    def __init__(self, files: Sequence[RowFile], index: np.ndarray):
        self._files = tuple(files)
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i.

        Raises:
            UserError: it is not JSON, no object, no Unicode, or the file changed; in one line with its place.
        """
        file, length, place, start = self._index[operator.index(i)].item()
        return self._files[file].read(start, place, length)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        """The file of row i, with its line (from 1) or, where there are no lines, its number (from 0)."""
        file, _, place, _ = self._index[operator.index(i)].item()
        return self._files[file].where(place)

    @property
    def num_bytes(self) -> int:
        """What the rows have in their files, decompressed. Rows of .parquet and .arrow files share that evenly."""
        return int(self._index["length"].sum(dtype=np.int64))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """The rows at ``indices``, in that order, sharing the files."""
        return Rows(self._files, self._index[np.asarray(indices, np.int64)])

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any byte of the files, and with which rows come in which order.

        They do not change with names.
        """
        used, number = np.unique(self._index["file"], return_inverse=True)
        places = np.stack([number, self._index["place"]], axis=1).astype("<i8")
        content = blake2b(b"".join(self._files[file].digest for file in used), digest_size=16)
        content.update(places.tobytes())
        return content.hexdigest()

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows, {self.num_bytes} bytes, {len(self._files)} files)"


def open_rows(
    path: str | Path,
    *,
    cache: Path,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Rows:
    """Opens files of rows, and passes over their bytes once to find the rows and to notice changes later.

    The order is that of the files' relative names, then that in the file. However large a file is, little of it is in
    memory at a time.

    Lines of a .jsonl file, or of a .json file that is one, are read where they are, and so are record batches of an
    .arrow file. What is compressed, the array of a .json file and .parquet are rewritten into the cache once, and
    messages name the original. A row of parquet costs the decoding of its row group, which shuffled reading would do
    for every row.

    Args:
        path: a file, a folder (with its subfolders), a glob pattern, or a dataset on the hub, org/name.
        cache: a folder for what is rewritten, which is found there by its content's hash and may be removed later.
        include: glob patterns on the path relative to the folder ("*" also matches "/"), of the files to read.
        exclude: glob patterns of files to leave out.
        max_record_bytes: the longest line, or row of a .json file, that is read.

    Raises:
        UserError: the path or a file is not usable. Of single rows only their length is looked at here.
    """
    if not 0 < max_record_bytes <= MOST_RECORD_BYTES:
        raise UserError(
            f"max_record_bytes is {max_record_bytes:,}, expected 1 to {MOST_RECORD_BYTES:,}; change it"
        )
    root, found = find_row_files(str(path), include, exclude)
    files: list[RowFile] = []
    index, batches = [], BlockCache[RecordBatch]()
    for number, (_, file) in enumerate(found):
        try:
            opened = _open(file, cache, max_record_bytes, batches)
            places = opened.scan()
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror or error}); mend or exclude it"
            ) from None
        places["file"] = number
        files.append(opened)
        index.append(places)
    rows = Rows(files, np.concatenate(index) if index else np.zeros(0, PLACES))
    if not len(rows):
        what = f"{len(files)} files are" if len(files) > 1 else f"{found[0][0]} is"
        raise UserError(f"{root}: no rows, because {what} empty; expected objects or rows")
    return rows


def _open(path: Path, cache: Path, max_record_bytes: int, batches: BlockCache[RecordBatch]) -> RowFile:
    """The rows of a file by its suffix, rewritten first where they cannot be read one by one."""
    name = path.name.lower()
    if name.endswith(".arrow"):
        return ArrowFile(path, batches)
    if name.endswith(".parquet"):
        rewritten, digest = parquet_as_arrow(path, cache)
        return ArrowFile(rewritten, batches, str(path), digest)
    packed = name.endswith((".gz", ".zst"))
    if name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") or has_lines(path, max_record_bytes):
        rewritten = as_lines(path, cache, max_record_bytes) if packed else path
        return JsonlFile(rewritten, max_record_bytes, str(path))
    return JsonlFile(array_as_lines(path, cache, max_record_bytes), max_record_bytes, str(path), rows=True)
