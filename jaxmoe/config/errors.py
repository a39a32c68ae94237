"""Words for what pydantic refuses: one line with the dotted key, the value found and what was expected."""

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxmoe.errors import listed, quote

_LISTED = 5

_REMOVED = {
    "then": "a run has no follow-up any more: give that one a YAML file of its own and start it after this one, "
    "with model.path leading to this run's export",
}
"""Keys of earlier versions, and what to do instead."""

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "union_tag_not_found": "a string or a mapping",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "a list of {max_length}",
    "invalid-json-value": "what JSON can hold",
}


def describe(error: ValidationError, model: type[BaseModel], mapping: Mapping[str, Any]) -> str:
    """One line for all errors; unknown keys come first, each with the nearest known one.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        mapping: its input, for telling keys from the tags that pydantic puts into the place of an error.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] not in ("extra_forbidden", "invalid_key"))
    known = list(_dotted_keys(model))
    lines = list(dict.fromkeys(_line(problem, known, mapping) for problem in problems))
    return listed(lines, _LISTED, "; ")


def _line(problem: ErrorDetails, known: list[str], mapping: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    key = _dotted(problem["loc"], mapping)
    if kind == "extra_forbidden" and key in _REMOVED:
        return f"{key}: {_REMOVED[key]}"
    if kind == "extra_forbidden":
        return f"{key}: unknown key, {_nearest(key, known)}"
    if kind == "invalid_key":
        return f"{key}: found a key that is no string, expected a name"
    if kind == "missing":
        return f"{key}: missing, expected a value"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    template = _EXPECTED.get(kind)
    # Limits of floats are floats: 1.0 reads as 1, and 2147483647 must not read as 2.1e+09.
    limits = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in context.items()}
    wanted = template.format(**limits) if template else problem["msg"]
    return f"{key}: found {_shown(problem['input'])}, expected {wanted}"


def _shown(value: Any) -> str:
    """The value in the words of YAML, with its type where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the string {quote(value)}" if isinstance(value, str) else quote(value)


def _dotted(location: tuple[int | str, ...], mapping: Any) -> str:
    """The place of an error without the tags of unions: what the input has no key for is one."""
    parts: list[str] = []
    here = mapping
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, list | tuple) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif not (last and isinstance(here, Mapping)):
            continue
        parts.append(part if isinstance(part, str) and part.isprintable() else repr(part))
    return ".".join(parts)


def _nearest(key: str, known: list[str]) -> str:
    section, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    leaves = {other.rpartition(".")[2]: other for other in siblings}
    close = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1)]
    elsewhere = [other for other in known if other.count(".") == key.count(".")]
    close = close or namesakes or difflib.get_close_matches(key, elsewhere, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(sorted(leaves))}" if leaves else "expected no such section"


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _models_in(inner)
