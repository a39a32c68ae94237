"""Text files as random-access documents, checked once from end to end when they are opened."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxmoe.block_cache import CACHE_BYTES, BlockCache
from jaxmoe.data.files import find_files
from jaxmoe.data.formats import (
    PART_BYTES,
    WHOLE_BYTES,
    Found,
    JsonlReader,
    Reader,
    TextReader,
    part_of,
)
from jaxmoe.data.parquet import ParquetReader
from jaxmoe.errors import UserError
from jaxmoe.json_lines import MAX_RECORD_BYTES

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Index:
    """Where each of N elements lies; every array is (N,)."""

    file: np.ndarray  # which reader
    start: np.ndarray  # as the reader's scan gave it, like length and place
    length: np.ndarray
    place: np.ndarray
    part: np.ndarray  # of the document, counted from 0
    size: np.ndarray  # of the whole document's text in UTF-8
    digest: np.ndarray  # uint64, of the element's bytes

    def take(self, rows: np.ndarray) -> "_Index":
        return _Index(*(getattr(self, column.name)[rows] for column in fields(self)))


_TYPES = {"file": "I", "place": "I", "part": "I", "digest": "Q"}  # the others are signed, 8 bytes


@dataclass(frozen=True)
class Part:
    """An element of a document: the bytes of UTF-8 that it has, and those around them.

    Where a part begins and ends may be inside a character.

    Attributes:
        begin: of the part, in bytes of the document.
        end: after its last byte.
        size: bytes of the document.
    """

    begin: int
    end: int
    size: int
    _read: "Reader"
    _start: int
    _length: int

    @property
    def is_first(self) -> bool:
        """Whether the document begins here."""
        return self.begin == 0

    @property
    def is_last(self) -> bool:
        """Whether the document ends here."""
        return self.end == self.size

    def read(self, begin: int, end: int) -> bytes:
        """Bytes of the document, fewer where it ends."""
        return self._read.read(self._start, self._length, max(begin, 0), min(end, self.size))


class Documents:
    """Documents in files, each read when it is asked for; safe to read from several threads.

    It is a random-access source as grain wants it (``len(documents)``, ``documents[i] -> str``) of N elements. An
    element is a document, or a part of 512 KiB of one with more than 16 MiB; the parts of a document follow each
    other. An element that no longer is what it was when the files were opened raises UserError.
    """

    def __init__(self, readers: Sequence[Reader], index: _Index):
        self._readers = tuple(readers)
        self._index = index

    def __len__(self) -> int:
        return len(self._index.file)

    def __getitem__(self, i: int) -> str:
        part = self.part(i)
        content = self.content(i)
        if part.is_first and part.is_last:
            return content.decode()
        # A character belongs to the part that it begins in.
        following = part.read(part.end, part.end + 3)
        return (_without_rest(content, not part.is_first) + _rest(following)).decode()

    def content(self, i: int) -> bytes:
        """The bytes of element i.

        Raises:
            UserError: they changed since the files were opened.
        """
        part = self.part(i)
        try:
            content = part.read(part.begin, part.end)
            unchanged = _digest(content) == self._index.digest[i]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            unchanged = False
        if not unchanged:
            raise self.changed(i)
        return content

    def changed(self, i: int) -> UserError:
        """What to say where element i no longer is what it was when the files were opened."""
        return UserError(f"{self.where(i)}: changed since it was opened; restore it or start the run again")

    def part(self, i: int) -> Part:
        """Which bytes of which document element i is."""
        index = self._index
        size = int(index.size[i])
        begin, end = part_of(size, int(index.part[i]))
        reader = self._readers[index.file[i]]
        return Part(begin, end, size, reader, int(index.start[i]), int(index.length[i]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def num_bytes(self, i: int) -> int:
        """The length of element i in bytes of UTF-8."""
        part = self.part(i)
        return part.end - part.begin

    @property
    def num_documents(self) -> int:
        """How many documents the elements are of, counted by their beginnings."""
        return int(self.beginnings().sum())

    @property
    def total_bytes(self) -> int:
        """The length of all elements in bytes of UTF-8."""
        return int(self.sizes().sum())

    @property
    def largest(self) -> int:
        """The length of the largest element in bytes of UTF-8."""
        return int(self.sizes().max(initial=0))

    def sizes(self) -> np.ndarray:
        """int64 (N,): the length of each element in bytes of UTF-8."""
        size, part = self._index.size, self._index.part.astype(np.int64)
        is_last = part == np.maximum(size // PART_BYTES, 1) - 1
        in_part = np.where(is_last, size - part * PART_BYTES, PART_BYTES)
        return np.where(size <= WHOLE_BYTES, size, in_part)

    def where(self, i: int) -> str:
        """The file of element i, with its line (from 1) or row (from 0) where it has one, for messages."""
        place = self._readers[self._index.file[i]].where(int(self._index.place[i]))
        part = self.part(i)
        return place if part.is_first and part.is_last else f"{place} from byte {part.begin}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Documents":
        """The elements at ``indices``, in that order, sharing the files."""
        return Documents(self._readers, self._index.take(np.asarray(indices, np.int64)))

    def beginnings(self) -> np.ndarray:
        """bool (N,): whether an element is a document's first."""
        return self._index.part == 0

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any text and the order of the texts, not with file names."""
        return blake2b(self._index.digest.tobytes(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Documents({len(self)} elements, {self.total_bytes} bytes, {len(self._readers)} files)"

    def digests(self) -> np.ndarray:
        """uint64 (N,): a hash of each element's text, equal for equal texts."""
        return self._index.digest


def _rest(content: bytes) -> bytes:
    """The bytes at the beginning that belong to a character that began before."""
    count = 0
    while count < min(3, len(content)) and content[count] & 0xC0 == 0x80:
        count += 1
    return content[:count]


def _without_rest(content: bytes, begun: bool) -> bytes:
    return content[len(_rest(content)) :] if begun else content


def open_documents(
    path: str | Path,
    *,
    field: str = "text",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Documents:
    """Opens a file or a folder (with its subfolders) of text, and reads all of it once to check it.

    A ``.txt`` file is one document; a ``.jsonl`` line and a ``.parquet`` row are one document each, in the
    string ``field``. Documents of white space only are left out. The order is that of the files' relative
    names, then that in the file. What is kept in memory is about 50 bytes per document; however large a file is,
    little of it is in memory at a time.

    Args:
        path: a file, a folder, or "python:stdlib" for the running Python's standard library (which has
            include and exclude patterns of its own, used where none are given).
        field: the JSON field or parquet column that holds the text.
        include: glob patterns on the path relative to the folder ("*" also matches "/"). Only files that
            match one are read, as plain text unless they end in .jsonl or .parquet.
        exclude: glob patterns of files to leave out.
        max_record_bytes: the longest line of a .jsonl file, and text of a .parquet row, that is read.

    Raises:
        UserError: the path, a file or a document in it is not usable; the message says where.
    """
    root, files = find_files(str(path), include, exclude)
    cache: BlockCache[pa.Array] = BlockCache(CACHE_BYTES)
    readers = [_open_reader(file, field, cache, max_record_bytes) for _, file in files]
    columns = {column.name: array(_TYPES.get(column.name, "q")) for column in fields(_Index)}
    for number, reader in enumerate(readers):
        try:
            for found in reader.scan():
                _add(columns, number, found)
        except OSError as error:
            raise UserError(f"{reader.path}: cannot be read ({error.strerror or error})") from None
    documents = Documents(readers, _Index(*(np.frombuffer(c, c.typecode) for c in columns.values())))
    if not len(documents):
        what = f"{len(files)} files are" if len(files) > 1 else f"{files[0][0]} is"
        raise UserError(f"{root}: no documents, because {what} empty or white space; expected text")
    _warn_of_slow_parquet(documents)
    return documents


def _open_reader(path: Path, field: str, cache: BlockCache[pa.Array], max_record_bytes: int) -> Reader:
    """The reader for the path's suffix; any suffix but .jsonl and .parquet is plain text."""
    match path.suffix.lower():
        case ".jsonl":
            return JsonlReader(path, field, max_record_bytes)
        case ".parquet":
            return ParquetReader(path, field, cache, max_record_bytes)
        case _:
            return TextReader(path)


def _add(columns: dict[str, array], file: int, found: Found) -> None:
    """Adds the elements of a document, unless all of it is white space."""
    before, blank = len(columns["file"]), True
    for part, content in enumerate(found.contents):
        blank = blank and _is_blank(content)
        row = (file, found.start, found.length, found.place, part, found.size, _digest(content))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    if blank:
        for column in columns.values():
            del column[before:]


def _is_blank(content: bytes) -> bool:
    text = content.decode(errors="ignore")  # a part may begin or end inside a character
    return not text or text.isspace()


def split_documents(documents: Documents, eval_fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Splits into (training, held-out) documents by a hash of each text, so that file order is irrelevant.

    About ``eval_fraction`` of the documents, at least one, are held out. Equal texts go to the same side.

    Raises:
        UserError: the fraction is not between 0 and 1, or one side would be empty.
    """
    if not 0 < eval_fraction < 1:
        raise UserError(f"the held-out fraction is {eval_fraction}; expected a number between 0 and 1")
    key = f"{seed}".encode()[:64]
    first = documents.beginnings()
    digests = documents.digests()[first]
    ranked = np.fromiter((_digest(digest.tobytes(), key) for digest in digests), np.uint64, len(digests))
    count = max(1, round(eval_fraction * len(ranked)))
    held_out = ranked <= np.partition(ranked, count - 1)[count - 1]
    if held_out.all():
        raise UserError(
            f"{len(ranked)} documents ({len(np.unique(ranked))} different) cannot be split with {eval_fraction} "
            "held out and some left for training; give more documents or a smaller fraction"
        )
    held_out = held_out[np.cumsum(first) - 1]  # the parts of a document go where its first one goes
    return documents.subset(np.flatnonzero(~held_out)), documents.subset(np.flatnonzero(held_out))


def _digest(content: bytes, key: bytes = b"") -> int:
    return int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "little")


def _warn_of_slow_parquet(documents: Documents) -> None:
    is_parquet = np.array([isinstance(reader, ParquetReader) for reader in documents._readers])
    in_parquet = int(documents.sizes()[is_parquet[documents._index.file]].sum())
    if in_parquet > CACHE_BYTES:
        _log.warning(
            "the parquet files hold %d bytes of text, more than the %d that are kept decoded: shuffled "
            "reading will decode a row group for nearly every document; .jsonl files read faster",
            in_parquet,
            CACHE_BYTES,
        )
