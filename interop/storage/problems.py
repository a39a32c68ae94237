"""What is wrong with a checkpoint, told in one line of a readable length."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from jaxmoe.errors import UserError, shortened

MAX_TOLD = 1000
"""Characters of all the problems of a message together."""

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)")


def raise_problems(where: object, problems: Sequence[str]) -> None:
    """Raise one UserError of one line with the problems, as many as `MAX_TOLD` holds; return if there are none.

    Problems that differ in the numbers of a name alone (``layers.3.``) are told as one, with those numbers.
    """
    if not problems:
        return
    count = f"{len(problems):,} problems: " if len(problems) > 1 else ""
    raise UserError(f"{where}: {count}{_told(list(_merged(problems)))}")


def _told(problems: Sequence[str]) -> str:
    first, *others = problems
    told, room = [shortened(first, MAX_TOLD)], MAX_TOLD - len(first)
    for problem in others:
        room -= len("; ") + len(problem)
        if room < 0:
            break
        told.append(problem)
    more = len(problems) - len(told)
    return "; ".join([*told, *([f"and {more:,} more"] if more else [])])


def _merged(problems: Iterable[str]) -> Iterator[str]:
    """The problems, ``a.{0..3}.b (4 tensors)`` for four that differ in a number; each comes once, exactly."""
    alike: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for problem in problems:
        pieces = _NUMBER.split(problem)
        alike.setdefault(tuple(pieces[::2]), set()).add(tuple(map(int, pieces[1::2])))
    for texts, numbers in alike.items():
        for axes in _boxes(numbers):
            count = math.prod(map(len, axes))
            merged = "".join(itertools.chain(*zip(texts, [*map(_set_text, axes), ""], strict=True)))
            yield f"{merged} ({count} tensors)" if count > 1 else merged


def _boxes(points: set[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Products of sets of numbers, disjoint, that together are the points."""
    if points == {()}:
        return [()]
    rest: dict[int, set[tuple[int, ...]]] = {}
    for first, *others in sorted(points):
        rest.setdefault(first, set()).add(tuple(others))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, following in rest.items():
        firsts.setdefault(frozenset(following), []).append(first)
    return [(tuple(same), *box) for following, same in firsts.items() for box in _boxes(set(following))]


def _set_text(numbers: Sequence[int]) -> str:
    """``3``, ``{0..47}`` or ``{0..3,7,9..11}``; the numbers ascend."""
    if len(numbers) == 1:
        return str(numbers[0])
    starts = [
        n for before, n in zip([None, *numbers], numbers, strict=False) if before is None or n != before + 1
    ]
    ends = [
        n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after is None or after != n + 1
    ]
    runs = (str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))
    return f"{{{','.join(runs)}}}"
