"""What is fetched from the hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from jaxmoe.errors import UserError, first_line

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".arrow", ".txt")


def is_hub_id(text: str) -> bool:
    """Whether it has the form org/name, and is not rather a file of data that is missing."""
    return _ID.fullmatch(text) is not None and not text.lower().endswith(_DATA)


def snapshot(hub_id: str, patterns: Sequence[str], repo_type: str = "model") -> Path:
    """The local snapshot of a hub repository's files that match patterns, downloaded if need be.

    Raises:
        UserError: it could not be downloaded.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(hub_id, repo_type=repo_type, allow_patterns=list(patterns))
    except Exception as error:  # the hub client's own errors, and those of three network libraries
        raise UserError(
            f"{hub_id!r} is no folder here, and could not be downloaded from the hub: {first_line(error)}"
        ) from error
    return Path(folder)
