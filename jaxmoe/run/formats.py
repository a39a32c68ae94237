"""Whether a run trains on plain text, document after document, or on rows that have a meaning each."""

import glob
import json
from pathlib import Path
from typing import Any

from jaxmoe.chat.finding import find_row_files
from jaxmoe.chat.formats import KNOWN_COLUMNS, detect
from jaxmoe.config import DataConfig
from jaxmoe.data.docstrings import DOCSTRINGS
from jaxmoe.data.files import STANDARD_LIBRARY, SUFFIXES, find_files
from jaxmoe.errors import UserError
from jaxmoe.files import open_regular, why_unusable
from jaxmoe.hub import is_hub_id


def is_text(data: DataConfig) -> bool:
    """Whether the data is read as documents: .txt files, and .jsonl and .parquet files with a column of text.

    Text in other files, of a glob pattern or of the hub is read as rows of the format text.

    Raises:
        UserError: columns of the first file fit several formats.
    """
    if data.sources or data.format not in ("auto", "text") or data.path == DOCSTRINGS:
        return False
    assert data.path is not None
    if data.path == STANDARD_LIBRARY or why_unusable(data.path):
        return True  # what is wrong with it its reader says
    path = Path(data.path).expanduser()
    if not path.exists():
        return not glob.has_magic(data.path) and not is_hub_id(data.path)
    files = _documents(data)
    if not files:
        return not _has_rows(data)
    if data.format == "text":
        return True
    row = _first_row(files[0], data.max_record_bytes)
    if row is None or any(file.suffix.lower() not in (".jsonl", ".parquet") for file in files):
        return True
    if data.field != "text" and data.field in row:
        return True
    try:
        return detect(row, fields=data.fields, where=str(files[0])) == "text"
    except UserError:
        if not data.fields and not KNOWN_COLUMNS & row.keys():
            return True  # whose reader says what is missing
        raise


def _documents(data: DataConfig) -> list[Path]:
    """The files that are read as documents, none where all are of other kinds."""
    assert data.path is not None
    path = Path(data.path).expanduser()
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        return []
    try:
        return [file for _, file in find_files(data.path, data.include, data.exclude)[1]]
    except UserError:
        return []


def _has_rows(data: DataConfig) -> bool:
    assert data.path is not None
    try:
        return bool(find_row_files(data.path, data.include, data.exclude)[1])
    except UserError:
        return False


def _first_row(file: Path, most: int) -> dict[str, Any] | None:
    """The first row of a file, or only its columns; None where it is plain text or what is there is no row."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            with open_regular(file):
                return dict.fromkeys(pq.read_schema(file).names, "")
        with open_regular(file) as lines:
            while line := lines.readline(most):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig"))
                    return row if isinstance(row, dict) else None
    except Exception:  # whatever is wrong with it, its reader says so
        return None
    return None
