"""Every key of a run's YAML with its default and meaning, as YAML."""

import json
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxmoe.config.run import RunConfig


def reference_yaml() -> str:
    """A commented YAML of all keys; keys without a default read ``REQUIRED``."""
    return "\n".join(_lines(RunConfig, "")) + "\n"


def _lines(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{indent}# {field.description}"
        section = _section(field)
        if section is None:
            default = "REQUIRED" if field.is_required() else json.dumps(field.default)
            yield f"{indent}{name}: {default}"
        else:
            yield f"{indent}{name}:{'  # null by default' if field.default is None else ''}"
            yield from _lines(section, indent + "  ")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section behind a key; alternatives to a string, such as that of ``tokenizer``, are not shown."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
