"""Text files as random-access documents, checked once from end to end when they are opened."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path

import numpy as np

from jaxmoe.data.files import find_files
from jaxmoe.data.formats import ROW_GROUP_CACHE_BYTES, ParquetReader, Reader, RowGroupCache, open_reader
from jaxmoe.errors import UserError

MAX_DOCUMENT_BYTES = 16 * 2**20
"""A document is tokenized in one call, which takes about 150 bytes of memory per byte of text."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Index:
    """Where each of N documents lies; every array is (N,)."""

    file: np.ndarray  # which reader
    start: np.ndarray  # as the reader's scan gave it, like length and place
    length: np.ndarray
    place: np.ndarray
    num_bytes: np.ndarray  # of the text in UTF-8
    digest: np.ndarray  # uint64, of the text

    def take(self, rows: np.ndarray) -> "_Index":
        return _Index(*(getattr(self, column.name)[rows] for column in fields(self)))


class Documents:
    """N documents in files, each read when it is asked for; safe to read from several threads.

    It is a random-access source as grain wants it (``len(documents)``, ``documents[i] -> str``). An element
    that no longer is what it was when the files were opened raises UserError.
    """

    def __init__(self, readers: Sequence[Reader], index: _Index):
        self._readers = tuple(readers)
        self._index = index

    def __len__(self) -> int:
        return len(self._index.file)

    def __getitem__(self, i: int) -> str:
        index = self._index
        reader = self._readers[index.file[i]]
        try:
            text = reader.read(int(index.start[i]), int(index.length[i]))
            unchanged = _digest(text.encode()) == index.digest[i]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{self.where(i)}: changed since it was opened; restore it or start the run again"
            )
        return text

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def num_bytes(self, i: int) -> int:
        """The length of document i in bytes of UTF-8."""
        return int(self._index.num_bytes[i])

    @property
    def total_bytes(self) -> int:
        """The length of all documents in bytes of UTF-8."""
        return int(self._index.num_bytes.sum())

    def where(self, i: int) -> str:
        """The file of document i, with its line (from 1) or row (from 0) where it has one, for messages."""
        return self._readers[self._index.file[i]].where(int(self._index.place[i]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Documents":
        """The documents at ``indices``, in that order, sharing the files."""
        return Documents(self._readers, self._index.take(np.asarray(indices, np.int64)))

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any text and the order of the texts, not with file names."""
        return blake2b(self._index.digest.tobytes(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents, {self.total_bytes} bytes, {len(self._readers)} files)"

    def digests(self) -> np.ndarray:
        """uint64 (N,): a hash of each text, equal for equal texts."""
        return self._index.digest


def open_documents(
    path: str | Path,
    *,
    field: str = "text",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Documents:
    """Opens a file or a folder (with its subfolders) of text, and reads all of it once to check it.

    A ``.txt`` file is one document; a ``.jsonl`` line and a ``.parquet`` row are one document each, in the
    string ``field``. Documents of white space only are left out. The order is that of the files' relative
    names, then that in the file. What is kept in memory is about 50 bytes per document.

    Args:
        path: a file, a folder, or "python:stdlib" for the running Python's standard library (which has
            include and exclude patterns of its own, used where none are given).
        field: the JSON field or parquet column that holds the text.
        include: glob patterns on the path relative to the folder ("*" also matches "/"). Only files that
            match one are read, as plain text unless they end in .jsonl or .parquet.
        exclude: glob patterns of files to leave out.

    Raises:
        UserError: the path, a file or a document in it is not usable; the message says where.
    """
    root, files = find_files(str(path), include, exclude)
    cache = RowGroupCache()
    readers = [open_reader(file, field, cache) for _, file in files]
    columns = {column.name: array("Q" if column.name == "digest" else "q") for column in fields(_Index)}
    for number, reader in enumerate(readers):
        try:
            for start, length, place, text in reader.scan():
                content = text.encode()
                if not text or text.isspace():
                    continue
                if len(content) > MAX_DOCUMENT_BYTES:
                    raise UserError(
                        f"{reader.where(place)}: a document of {len(content)} bytes, at most "
                        f"{MAX_DOCUMENT_BYTES} can be tokenized at once; split it into several documents"
                    )
                row = (number, start, length, place, len(content), _digest(content))
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
        except OSError as error:
            raise UserError(f"{reader.path}: cannot be read ({error.strerror or error})") from None
    documents = Documents(readers, _Index(*(np.array(column) for column in columns.values())))
    if not len(documents):
        what = f"{len(files)} files are" if len(files) > 1 else f"{files[0][0]} is"
        raise UserError(f"{root}: no documents, because {what} empty or white space; expected text")
    _warn_of_slow_parquet(documents)
    return documents


def split_documents(documents: Documents, eval_fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Splits into (training, held-out) documents by a hash of each text, so that file order is irrelevant.

    About ``eval_fraction`` of the documents, at least one, are held out. Equal texts go to the same side.

    Raises:
        UserError: the fraction is not between 0 and 1, or one side would be empty.
    """
    if not 0 < eval_fraction < 1:
        raise UserError(f"the held-out fraction is {eval_fraction}; expected a number between 0 and 1")
    key = f"{seed}".encode()[:64]
    hashes = [_digest(digest.tobytes(), key) for digest in documents.digests()]
    ranked = np.array(hashes, np.uint64)
    count = max(1, round(eval_fraction * len(documents)))
    held_out = ranked <= np.sort(ranked)[count - 1]
    if held_out.all():
        raise UserError(
            f"{len(documents)} documents ({len(set(hashes))} different) cannot be split with {eval_fraction} "
            "held out and some left for training; give more documents or a smaller fraction"
        )
    return documents.subset(np.flatnonzero(~held_out)), documents.subset(np.flatnonzero(held_out))


def _digest(content: bytes, key: bytes = b"") -> int:
    return int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "little")


def _warn_of_slow_parquet(documents: Documents) -> None:
    is_parquet = np.array([isinstance(reader, ParquetReader) for reader in documents._readers])
    in_parquet = int(documents._index.num_bytes[is_parquet[documents._index.file]].sum())
    if in_parquet > ROW_GROUP_CACHE_BYTES:
        _log.warning(
            "the parquet files hold %d bytes of text, more than the %d that are kept decoded: shuffled "
            "reading will decode a row group for nearly every document; .jsonl files read faster",
            in_parquet,
            ROW_GROUP_CACHE_BYTES,
        )
