"""Values as rows have them: looked up, checked, and what to say of those that are not as expected.

``at`` is where a value lies, for messages: the file with its line or row, and the path of the value in it.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import UserError, listed, quote
from jaxmoe.json_lines import half_surrogate, json_type

_LISTED = 8
_MOST_WEIGHT = 1e30  # sums of it are finite in float32


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """What lies at a path of dotted names and list indices; None where nothing does, or null.

    A name that has dots itself wins.
    """
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def shown(value: object) -> str:
    """A value in a few words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return (
            f"an object with {listed([quote(key) for key in value], _LISTED)}" if value else "an empty object"
        )
    if isinstance(value, list):
        return f"an array of {len(value)}"
    return f"the {json_type(value)} {quote(value)}"


def unexpected(at: str, value: object, expected: str, remedy: str) -> UserError:
    """What to say of a value that is none of those that were expected."""
    return UserError(f"{at} is {shown(value)}, expected {expected}; {remedy}")


def text(at: str, value: object, remedy: str = "mend or remove the row") -> str:
    """A value that has to be a string, of Unicode.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str):
        raise unexpected(at, value, "a string", remedy)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise half_surrogate(at, error.start) from None
    return value


def parsed(at: str, value: object, expected: str) -> Any:
    """A value, or what it says where it is a string with JSON.

    Raises:
        UserError: it is a string with something else.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"{at} is {shown(value)}, which is not JSON ({reason}), expected {expected}; mend or remove the row"
        ) from None


def without_nulls(at: str, value: Any) -> Any:
    """A value without the keys that are null, at any depth: a table gives every object the keys of all of them.

    Raises:
        UserError: a string in it is no Unicode.
    """
    if isinstance(value, str):
        return text(at, value)
    if isinstance(value, Mapping):
        return {
            text(at, key): without_nulls(f"{at}.{key}", item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(f"{at}[{i}]", item) for i, item in enumerate(value)]
    return value


def json_value(at: str, value: Any) -> Any:
    """``without_nulls`` of what templates write as JSON.

    Raises:
        UserError: something in it is none that JSON has, such as a date or bytes; a string is no Unicode.
    """
    value = without_nulls(at, value)
    _refuse_others(at, value)
    return value


def _refuse_others(at: str, value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_others(f"{at}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_others(f"{at}[{i}]", item)
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise unexpected(at, value, "a value of JSON", "write it as a string")


def objects(at: str, value: object, expected: str, remedy: str) -> list[dict[str, Any]]:
    """A value that has to be an array of objects, or a string with one as JSON; their null keys are dropped.

    Raises:
        UserError: it is not.
    """
    value = parsed(at, value, expected)
    if not isinstance(value, list):
        raise unexpected(at, value, expected, remedy)
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise unexpected(f"{at}[{i}]", item, "an object", remedy)
    return [{key: item for key, item in entry.items() if item is not None} for entry in value]


def mapping(at: str, value: object, expected: str, remedy: str) -> dict[str, Any]:
    """A value that has to be an object, or a string with one as JSON; its null keys are dropped at any depth.

    Raises:
        UserError: it is not.
    """
    value = parsed(at, value, expected)
    if not isinstance(value, Mapping):
        raise unexpected(at, value, expected, remedy)
    return json_value(at, value)


def weight_of(
    at: str, train: object, weight: object, names: tuple[str, str] = ("train", "weight")
) -> float | None:
    """What a flag and a number say of how much something counts in the loss; None where there is neither.

    Args:
        at: of the object that has them.
        train: true or false, or None.
        weight: 0 or more, or None.
        names: what the object calls the two.

    Raises:
        UserError: one of them is neither, or they contradict each other.
    """
    if train is not None and not isinstance(train, bool):
        raise unexpected(f"{at}.{names[0]}", train, "true or false", "give a number as the weight")
    if weight is None:
        return None if train is None else float(train)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise unexpected(
            f"{at}.{names[1]}", weight, "a number of 0 or more", "mend it, or give true or false as train"
        )
    if not 0 <= weight <= _MOST_WEIGHT:
        raise unexpected(f"{at}.{names[1]}", weight, "a finite number of 0 or more", "mend or remove it")
    if train is not None and train != (weight > 0):
        raise UserError(
            f"{at} has {names[0]} {str(train).lower()} and {names[1]} {weight}, expected them to agree; remove one"
        )
    return float(weight)
