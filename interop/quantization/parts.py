"""Reading parts of the tensors that a quantised tensor is made of, and packing them again.

What is wanted of a tensor is an `Axis` for each of its axes in the stored order. Where a stored number serves one index
of an axis, just those are read that are wanted; where it serves several, all from the first to the last of them.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxmoe.interop.quantization.stored_form import COLUMNS, Packing, Part
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.slices import positions


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """What is wanted along one axis.

    Attributes:
        sizes: of the finer axes that it is seen as.
        box: the part of those.
        length: of the axis.
        blocks: the number of the block that each of the wanted indices is in, where it is not index // step.
    """

    sizes: tuple[int, ...]
    box: tuple[slice, ...]
    length: int
    blocks: np.ndarray | None = None

    @functools.cached_property
    def at(self) -> np.ndarray:
        """The wanted indices, ascending."""
        return positions(self.sizes, self.box, range(len(self.sizes)))

    def index(self, step: int) -> np.ndarray:
        """Which integer or float each wanted index has, if each of these serves `step` of them."""
        if step == 1:
            return self.at
        return self.at // step if self.blocks is None else self.blocks

    def whole(self) -> "Axis":
        """All of the axis."""
        return Axis((self.length,), (slice(0, self.length),), self.length)


def read_words(stored: CheckpointFolder, part: Part, axes: Sequence[Axis]) -> np.ndarray:
    """The stored numbers that have what is wanted, one axis each; of a part with a `run` those on its one axis."""
    if part.run is not None:
        first, last = _run_range(part.run, axes)
        length = part.stored([axis.length for axis in axes])
        return stored.read_box(part.tensor, length, [slice(first, last)])
    sizes: list[int] = []
    box: list[slice] = []
    lengths: list[int] = []
    for number, axis in enumerate(axes, -len(axes)):
        step, count = part.grain(number)
        if step * count == 1:
            sizes += axis.sizes
            box += axis.box
            lengths.append(len(axis.at))
            continue
        fold = part.fold if number == COLUMNS else 1
        first, last = _range(part, number, axis)
        words = math.ceil(math.ceil(axis.length / step) / count)
        sizes += [words // fold, fold] if fold > 1 else [words]
        box += [slice(first // fold, last // fold), slice(0, fold)] if fold > 1 else [slice(first, last)]
        lengths.append(last - first)
    return stored.read_box(part.tensor, sizes, box).reshape(lengths)


def numbers(part: Part, words: np.ndarray, held: Sequence[Axis], wanted: Sequence[Axis]) -> np.ndarray:
    """Take the integers or floats of what is wanted out of the stored numbers of what is held.

    Args:
        part: the stored tensor.
        words: `read_words` for `held`.
        held: the axes of `wanted`, or whole ones.
        wanted: axes.

    Returns:
        Along an axis with one for each index those wanted; along others all from the first to the last, to be spread
        by `places`.
    """
    if part.run is not None:
        return words
    chosen: list[np.ndarray | None] = []
    for number, (has, wants) in enumerate(zip(held, wanted, strict=True), -len(held)):
        step, count = part.grain(number)
        if step * count == 1:
            chosen.append(None if has is wants else wants.at)
            continue
        origin, (first, last) = _range(part, number, has)[0], _range(part, number, wants)
        words = words[(slice(None),) * (number + len(held)) + (slice(first - origin, last - origin),)]
        index = wants.at if step == 1 else np.arange(wants.index(step).min(), wants.index(step).max() + 1)
        chosen.append(index - first * count)
    found = words if part.packing is None else unpack(words, part.packing)
    for axis, indices in enumerate(chosen):
        if indices is not None and not _is_all(indices, found.shape[axis]):
            found = found.take(indices, axis)
    return found


def places(part: Part, wanted: Sequence[Axis]) -> list[np.ndarray]:
    """Of each wanted index of each axis, where along the axes of `numbers` its own is."""
    steps = [part.grain(number)[0] for number in range(-len(wanted), 0)]
    indices = [axis.index(step) for axis, step in zip(wanted, steps, strict=True)]
    return [
        np.arange(len(index)) if step == 1 else index - index.min()
        for index, step in zip(indices, steps, strict=True)
    ]


def spread(part: Part, found: np.ndarray, wanted: Sequence[Axis]) -> np.ndarray:
    """Repeat what `numbers` found of a part for every wanted index, or leave it to broadcasting where there is one."""
    if part.run is not None:
        return found[_flat(wanted) // part.run - _run_range(part.run, wanted)[0]]
    for axis, index in enumerate(places(part, wanted)):
        if found.shape[axis] > 1 and not _is_all(index, found.shape[axis]):
            found = found.take(index, axis)
    return found


def nested_scales(
    scales: Part, codes: np.ndarray, nested: Part, factors: np.ndarray, wanted: Sequence[Axis]
) -> np.ndarray:
    """Of each of the quantised scales that `numbers` found, the one of the `factors` found that it goes with."""
    assert scales.run is not None
    assert nested.run is not None
    first = _run_range(scales.run, wanted)[0]
    of = (first + np.arange(len(codes))) // (nested.run // scales.run)
    return factors[of - _run_range(nested.run, wanted)[0]]


def begun(part: Part, words: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """Those of `read_words` whose first element is wanted, so that each is in one of bands that follow each other."""
    if part.run is None:
        return words
    return words[1:] if _first(axes) % part.run else words


def _first(axes: Sequence[Axis]) -> int:
    place = 0
    for axis in axes:
        place = place * axis.length + int(axis.at[0])
    return place


def _flat(axes: Sequence[Axis]) -> np.ndarray:
    """The places of what is wanted in row-major order."""
    places = np.zeros((), np.int64)
    for axis in axes:
        places = places[..., None] * axis.length + axis.at
    return places


def _run_range(run: int, axes: Sequence[Axis]) -> tuple[int, int]:
    """From where to where stored numbers that serve runs of elements have what is wanted."""
    last = 0
    for axis in axes:
        last = last * axis.length + int(axis.at[-1])
    return _first(axes) // run, last // run + 1


def _range(part: Part, number: int, axis: Axis) -> tuple[int, int]:
    """From where to where stored numbers have what is wanted of an axis."""
    step, count = part.grain(number)
    index = axis.index(step)
    first, last = int(index.min()) // count, int(index.max()) // count + 1
    fold = part.fold if number == COLUMNS else 1
    return first // fold * fold, -(-last // fold) * fold


def _is_all(index: np.ndarray, length: int) -> bool:
    return len(index) == length and bool((index == np.arange(length)).all())


def unpack(words: np.ndarray, packing: Packing) -> np.ndarray:
    """Stored numbers → the integers in them, uint8, the packed axis so many times as long."""
    words = np.ascontiguousarray(words).view(f"u{words.dtype.itemsize}")
    words = words + words.dtype.type(packing.added)  # modulo the range
    axis = words.ndim + packing.axis
    before, after = words.shape[: axis + 1], words.shape[axis + 1 :]
    out = np.empty((*before, len(packing.shifts), *after), np.uint8)
    for place, shift in enumerate(packing.shifts):
        out[(slice(None),) * (axis + 1) + (place,)] = words >> shift & (2**packing.bits - 1)
    return out.reshape(*before[:-1], -1, *after)


def pack(integers: np.ndarray, packing: Packing, dtype: np.dtype) -> np.ndarray:
    """The reverse of `unpack`; what lacks of the last stored number is 0."""
    axis, count = integers.ndim + packing.axis, len(packing.shifts)
    missing = -integers.shape[axis] % count
    if missing:
        integers = np.pad(integers, [(0, missing if at == axis else 0) for at in range(integers.ndim)])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    before, after = integers.shape[:axis], integers.shape[axis + 1 :]
    apart = integers.reshape(*before, -1, count, *after)
    words = np.zeros((*before, apart.shape[axis], *after), unsigned)
    for place, shift in enumerate(packing.shifts):
        words |= apart[(slice(None),) * (axis + 1) + (place,)].astype(unsigned) << unsigned.type(shift)
    return (words - unsigned.type(packing.added)).view(dtype)
