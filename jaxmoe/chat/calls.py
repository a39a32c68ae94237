"""Calls of tools in the text that a template makes of them."""

import collections
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_QUOTING = re.compile(r"[\s\"'\\]+")


def as_python(call: Mapping[str, Any]) -> str | None:
    """What Python writes of a call's arguments; None where that is JSON."""
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, Mapping):
        return None
    written = str(dict(arguments))
    return None if written == json.dumps(arguments, ensure_ascii=False) else written


def missing_part(calls: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """A part of calls that a text has less often than they have it; quotes, escapes and white space aside."""
    bare = _QUOTING.sub("", text)
    for part, times in collections.Counter(itertools.chain.from_iterable(map(_parts, calls))).items():
        written = (part, json.dumps(part), json.dumps(part, ensure_ascii=False))
        if max(bare.count(_QUOTING.sub("", form)) for form in written) < times:
            return part
    return None


def _parts(value: Any) -> Iterator[str]:
    """The texts in the function of a call: its name, and its arguments with their names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        function = value.get("function")
        if isinstance(function, Mapping):
            yield from _parts([function["name"], function.get("arguments")])
        else:
            yield from _parts([*map(str, value), *value.values()])
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _parts(entry)
