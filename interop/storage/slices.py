"""Boxes: parts of arrays, and how they lie in axes that are split finer."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Box = tuple[slice, ...]
"""One slice per axis, bounds given."""


def pieces(box: Sequence[slice], elements: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `elements` each, which follow each other in C order."""
    axis, inner = len(box), 1
    while axis and inner * (box[axis - 1].stop - box[axis - 1].start) <= elements:
        axis -= 1
        inner *= box[axis].stop - box[axis].start
    if not axis:
        yield tuple(box)
        return
    *outer, cut = box[:axis]
    step = elements // inner
    for index in itertools.product(*(range(part.start, part.stop) for part in outer)):
        for start in range(cut.start, cut.stop, step):
            run = slice(start, min(start + step, cut.stop))
            yield (*(slice(i, i + 1) for i in index), run, *box[axis:])


def runs(sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Boxes on axes of `sizes`, in C order, that together are elements `start` to `stop` of an array of them."""
    if start >= stop:
        return
    if not sizes:
        yield ()
        return
    rest = sizes[1:]
    inner = math.prod(rest)
    first, last = start // inner, stop // inner
    if start % inner:  # from within a row to its end
        end = min(stop, (first + 1) * inner)
        for box in runs(rest, start - first * inner, end - first * inner):
            yield (slice(first, first + 1), *box)
        first += 1
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in rest))
    if first <= last and stop % inner:  # the beginning of a row
        for box in runs(rest, 0, stop % inner):
            yield (slice(last, last + 1), *box)


def finer_axes(shape: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Which axes of `sizes` each axis of `shape` (none of them empty) is split into.

    Raises:
        ValueError: `sizes` do not split `shape`.
    """
    axes: list[list[int]] = []
    taken = 0
    for size in shape:
        product, group = 1, []
        while product < size and taken < len(sizes):
            product *= sizes[taken]
            group.append(taken)
            taken += 1
        axes.append(group)
        if product != size:
            break
    ones = list(range(taken, len(sizes)))  # an axis of 1 is anyone's
    if product != size or len(axes) != len(shape) or any(sizes[axis] != 1 for axis in ones):
        raise ValueError(f"{tuple(sizes)} does not split {tuple(shape)}")
    axes[-1] += ones
    return axes


def positions(sizes: Sequence[int], box: Sequence[slice], axes: Sequence[int]) -> np.ndarray:
    """Where the part of `box` on some `axes` of `sizes` lies on the one axis that they split, ascending."""
    places = np.zeros((), np.int64)
    for axis in axes:
        places = places[..., None] * sizes[axis] + np.arange(*box[axis].indices(sizes[axis]))
    return places.ravel()
