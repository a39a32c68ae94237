"""The README's tables, as the code has them: `make readme` writes them, and a test checks that they are there."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from helpers import supported
from jaxmoe.config import RunConfig

README = Path(__file__).parent.parent.parent / "README.md"


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One row of the table for every key below `model`."""
    for name, field in model.model_fields.items():
        inner = [x for x in (field.annotation, *get_args(field.annotation)) if isinstance(x, type)]
        section = next((x for x in inner if issubclass(x, BaseModel)), None)
        if section is not None:
            yield from _rows(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            yield f"| `{prefix}{name}` | {default} | {field.description} |"


def _keys() -> str:
    return "\n".join(("| key | default | |", "|---|---|---|", *_rows(RunConfig))) + "\n"


TABLES: Mapping[str, Callable[[], str]] = {"keys": _keys, "models": supported.table}
"""What writes each table."""


def place_of(table: str, text: str) -> tuple[int, int]:
    """Where the table begins and ends, between its two comments. Raises ValueError without them."""
    found = re.search(rf"<!-- {table}: [^\n]*-->\n(.*)<!-- end of {table} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no comments around the table '{table}': expected <!-- {table}: … --> and its end")
    return found.span(1)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for table, write in TABLES.items():
        start, stop = place_of(table, text)
        text = text[:start] + write() + text[stop:]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
