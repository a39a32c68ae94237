"""Whether a run trains on plain text, document after document, or on rows that have a meaning each."""

import json
from pathlib import Path
from typing import Any

from jaxmoe.chat.formats import detect
from jaxmoe.config import DataConfig
from jaxmoe.data.docstrings import DOCSTRINGS
from jaxmoe.data.files import STANDARD_LIBRARY, find_files
from jaxmoe.errors import UserError
from jaxmoe.files import open_regular, why_unusable

_ROWS_ONLY = (".json", ".arrow", ".gz", ".zst")


def is_text(data: DataConfig) -> bool:
    """Whether the data is read as documents: .txt files, and .jsonl and .parquet files with a column of text.

    Raises:
        UserError: columns of the first file fit several formats.
    """
    if data.sources or data.format != "auto":
        return data.format == "text" and not data.sources
    assert data.path is not None
    path = Path(data.path).expanduser()
    if data.path == DOCSTRINGS:
        return False
    if data.path == STANDARD_LIBRARY or why_unusable(data.path):
        return True
    if not path.exists() or (path.is_file() and path.suffix.lower() in _ROWS_ONLY):
        return (
            "*" not in data.path and "?" not in data.path and not _is_hub_id(data.path) and not path.exists()
        )
    try:
        files = [file for _, file in find_files(data.path, data.include, data.exclude)[1]]
    except UserError:  # there may be files of rows of which that knows nothing
        return not (
            path.is_dir() and any(f.suffix.lower() in _ROWS_ONLY for f in path.rglob("*") if f.is_file())
        )
    row = _first_row(files[0], data.max_record_bytes)
    if row is None or any(file.suffix.lower() not in (".jsonl", ".parquet") for file in files):
        return True
    if data.field != "text" and data.field in row:
        return True
    try:
        return detect(row, fields=data.fields, where=str(files[0])) == "text"
    except UserError:
        if not data.fields and not _KNOWN & row.keys():
            return True  # whose reader says what is missing
        raise


_KNOWN = frozenset(
    {"messages", "conversations", "prompt", "completion", "instruction", "segments", "input_ids"}
)


def _is_hub_id(path: str) -> bool:
    from jaxmoe.hub import is_hub_id

    return is_hub_id(path)


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
    except Exception:
        return None
    return None
