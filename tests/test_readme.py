"""The README says what the code does: its tables of keys and of supported models, and its example of a run.

``python tests/test_readme.py`` writes the tables anew.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from helpers import supported
from pydantic import BaseModel

from jaxmoe.config import RunConfig

README = Path(__file__).parent.parent / "README.md"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One row of the table for every key below `model`."""
    for name, field in model.model_fields.items():
        inner = [x for x in (field.annotation, *get_args(field.annotation)) if isinstance(x, type)]
        section = next((x for x in inner if issubclass(x, BaseModel)), None)
        if section is not None:
            yield from rows(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            yield f"| `{prefix}{name}` | {default} | {field.description} |"


def keys() -> str:
    return "\n".join(("| key | default | |", "|---|---|---|", *rows(RunConfig))) + "\n"


TABLES = {"keys": keys, "models": supported.table}


def place_of(table: str) -> re.Pattern[str]:
    """Its first line, its text, its last line."""
    return re.compile(rf"(<!-- {table}: [^\n]*-->\n)(.*)(<!-- end of {table} -->)", re.DOTALL)


@pytest.mark.parametrize("table", TABLES)
def test_table_is_that_of_the_code(table):
    found = place_of(table).search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == TABLES[table](), "run: python tests/test_readme.py"


def test_example_is_a_valid_run():
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert RunConfig.from_mapping(yaml.safe_load(example)).train.accumulation == 4


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for table, write in TABLES.items():
        found = place_of(table).search(text)
        text = text[: found.start(2)] + write() + text[found.end(2) :]
    README.write_text(text, encoding="utf-8")
