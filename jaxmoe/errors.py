"""The one exception that means "the user can mend this", and how its message quotes what may be of any length."""

import difflib
from collections.abc import Collection, Sequence


class UserError(Exception):
    """A mistake in a file, key, value or shape that the user gave.

    The message is one sentence or a short list: the value found, what was expected, and the remedy.
    Commands print it without a traceback and exit with code 2 (see ``jaxmoe.cli``); library callers
    catch it like any other exception.
    """


def shortened(text: str, most: int = 300) -> str:
    """A text of at most so many characters, with dots where it was cut."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def quote(value: object) -> str:
    """``repr`` of a readable length: what is quoted comes out of files that may hold anything."""
    return shortened(repr(value), 200)


def listed(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first so many texts in a row, and the number of the others."""
    shown = separator.join(texts[:most])
    more = len(texts) - most
    return f"{shown}{separator.rstrip(', ')} and {more} more" if more > 0 else shown


def available(name: str, names: Collection[str]) -> str:
    """Which names there are instead of one that is missing, the nearest one first."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}it has {listed([*map(repr, names)], 8) or 'none'}"


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of the memory that was wanted and not there; None for an error of another kind.

    jax has no type of its own for it, and is not imported here.
    """
    if isinstance(error, MemoryError):
        return f"out of memory ({first_line(error)})"
    if "RESOURCE_EXHAUSTED" not in str(error) or not type(error).__name__.endswith("RuntimeError"):
        return None
    return f"out of memory ({first_line(error).removeprefix('RESOURCE_EXHAUSTED: ')})"


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, whose message may go on for pages; its type where it has none."""
    return shortened((str(error).splitlines() or [type(error).__name__])[0])
