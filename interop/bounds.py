"""What no config.json says: refused before anything is made of it.

transformers' config classes write a list of what each layer is and a dictionary of as many labels as they are told, and
conversion rules make an object of every tensor.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmoe.errors import UserError, quote, shortened

MAX_BYTES = 16 << 20
"""Of a file; those with the most labels have some hundred kilobytes."""

MAX_LAYERS = 1_000

MAX_EXPERTS = 200_000
"""Of all layers together; the largest published models have some 25,000."""

MAX_SIZE = 10_000_000
"""Of one axis of a parameter; the largest published vocabularies have 300,000 tokens."""

MAX_POSITIONS = 2**31 - 1
"""Of positions and windows, which are int32."""

MAX_PARAMETERS = 10**13

_MAX_COUNT = 100_000
_MAX_ENTRIES = 100_000  # of one list or object; there are models of 22,000 labels
_MAX_VALUES = 500_000
_MAX_TEXT = 1_000_000
_MAX_NAME = 1_000
_MAX_DEPTH = 50

_CONTAINERS = (Mapping, list, tuple)
_COUNTS = re.compile(r"(^|_)(num|n)_|_layers$|experts$")


def check_text(text: str, file: str) -> None:
    """Refuse JSON of so many values that reading it would take hundreds of megabytes.

    Raises:
        UserError: it is.
    """
    values = sum(map(text.count, ",[{"))
    if values > _MAX_VALUES:
        raise UserError(
            f"{file} has about {values:,} values: expected at most {_MAX_VALUES:,}; download it again"
        )


def check_plausible(raw: Mapping[str, Any], file: str) -> None:
    """Refuse counts, lists, texts and nesting beyond those of any model.

    Args:
        raw: a config.json.
        file: what to call it in messages.

    Raises:
        UserError: the first that is found.
    """
    found = 0
    level: list[Any] = [raw]
    for _ in range(_MAX_DEPTH):
        inner = (value for outer in level for value in _within(outer, file))
        level = list(itertools.islice(inner, _MAX_VALUES + 1 - found))
        found += len(level)
        if found > _MAX_VALUES:
            raise UserError(
                f"{file} has more than {_MAX_VALUES:,} values, expected a config.json's few; download it again"
            )
        if not level:
            return
    raise UserError(
        f"{file} has values within {_MAX_DEPTH} others: expected a config.json's few; download it again"
    )


def _within(outer: Any, file: str) -> Iterator[Any]:
    """The values of a list or object, checked as far as they need no looking into."""
    if not isinstance(outer, _CONTAINERS):
        return
    for name, value in outer.items() if isinstance(outer, Mapping) else (("", value) for value in outer):
        problem = None
        if len(str(name)) > _MAX_NAME:
            problem = "is no field of any model"
        elif isinstance(value, _CONTAINERS) and len(value) > _MAX_ENTRIES:
            problem = f"has {len(value):,} entries: expected at most {_MAX_ENTRIES:,}"
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            problem = f"has {len(value):,} characters: expected at most {_MAX_TEXT:,}"
        elif isinstance(value, int) and value > _most(str(name)):
            problem = f"= {quote(value)}: expected at most {_most(str(name)):,}"
        if problem is not None:
            raise UserError(f"{file}: {shortened(str(name)) or 'a list'} {problem}")
        yield value


@functools.lru_cache(1000)
def _most(name: str) -> float:
    """The largest integer that a field may have here; what counts nothing is checked by who reads it."""
    if name == "num_hidden_layers":
        return MAX_LAYERS
    return _MAX_COUNT if _COUNTS.search(name) else math.inf
