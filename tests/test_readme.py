"""The README says what the code does: its table of keys, and its example of a run.

``python tests/test_readme.py`` writes the table anew.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel

from jaxmoe.config import RunConfig

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- keys: [^\n]*-->\n)(.*)(<!-- end of keys -->)", re.DOTALL)


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


def table() -> str:
    return "\n".join(("| key | default | |", "|---|---|---|", *rows(RunConfig))) + "\n"


def test_table_of_keys_is_that_of_the_code():
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == table(), "run: python tests/test_readme.py"


def test_example_is_a_valid_run():
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert RunConfig.from_mapping(yaml.safe_load(example)).train.accumulation == 4


if __name__ == "__main__":
    README.write_text(
        TABLE.sub(lambda found: found[1] + table() + found[3], README.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
