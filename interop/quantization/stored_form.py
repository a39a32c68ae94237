"""How a quantised tensor lies in a folder: the stored tensors that it is made of, and what their numbers are for.

Every format here is one formula. An element is the value of its code, less the zero point of its block if there are
zero points, times the scale of its block, which a further scale of the whole tensor may multiply or divide, or which
may be quantised itself. A `QuantizedTensor` says which stored tensor has which of these; a `Format` finds them by
names, dtypes and shapes. `jaxmoe.interop.quantization.folder` reads and writes them.

Stored tensors have the matrix' rows and columns last, whatever the order of the axes in the unquantised tensor: (...,
rows, columns). So a matrix that is stored transposed has the axes (out, in), and rows along in.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.arithmetic import SMALLEST_NORMAL, Arithmetic
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

ROWS, COLUMNS = -2, -1
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Several small integers in one stored number, along one axis.

    Attributes:
        shifts: where in the stored number each of the integers begins, in bits, in their order along the axis.
        bits: of an integer.
        axis: `ROWS` or `COLUMNS`.
        added: what a stored number lacks, modulo its range.
    """

    shifts: tuple[int, ...]
    bits: int
    axis: int
    added: int = 0


def packed(width: int, bits: int, axis: int, added: int = 0) -> Packing:
    """Integers that follow each other in a number of `width` bits, the first in the lowest bits."""
    return Packing(tuple(range(0, width, bits)), bits, axis, added)


@dataclasses.dataclass(frozen=True)
class Part:
    """One stored tensor of those that a quantised tensor is made of.

    Attributes:
        tensor: its name.
        step: rows and columns of elements that share one of its integers or floats.
        packing: where several of them lie in one stored number.
        fold: the stored columns are two axes, of which the last has this length.
        run: so many elements share one, in row-major order and across the ends of rows; `step` then says nothing.
        flat: all of it is stored as one axis.
    """

    tensor: str
    step: tuple[int, int] = (1, 1)
    packing: Packing | None = None
    fold: int = 1
    run: int | None = None
    flat: bool = False

    def grain(self, axis: int) -> tuple[int, int]:
        """Elements along an axis that share an integer or float, and how many of those a stored number has."""
        if axis < ROWS:
            return 1, 1
        packs = self.packing is not None and self.packing.axis == axis
        return self.step[axis], len(self.packing.shifts) if self.packing is not None and packs else 1

    def stored(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the stored tensor for elements of `shape`, its columns as one axis."""
        if self.run is not None:
            return (math.ceil(math.prod(shape) / self.run),)
        grains = (self.grain(axis) for axis in range(-len(shape), 0))
        sizes = tuple(
            math.ceil(math.ceil(size / step) / count)
            for size, (step, count) in zip(shape, grains, strict=True)
        )
        return (math.prod(sizes),) if self.flat else sizes


@dataclasses.dataclass(frozen=True)
class Whole:
    """The scale of a whole matrix, beside those of its blocks.

    Attributes:
        part: where it is.
        divides: it divides the scales of blocks; otherwise it multiplies them.
        most: the largest number that codes and scales of blocks reach together.
    """

    part: Part
    divides: bool
    most: float

    def applied(self, factors: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Factors of blocks with it."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return factors / scale if self.divides else factors * scale

    def serving(self, scale: np.ndarray, largest: float) -> np.ndarray:
        """It as it is if codes and scales of blocks then reach `largest`, or else the one with which they just do."""
        least = max(largest / self.most, SMALLEST_NORMAL)
        # The scale and the code nearest to a number that is a little larger are still the largest ones.
        if (self.applied(np.ones((), np.float64), scale) * (1 + 2.0**-6) >= least).all():
            return scale
        return np.full_like(scale, 1 / least if self.divides else least)


@dataclasses.dataclass(frozen=True)
class Nested:
    """How scales are quantised themselves, that are stored in the order of their blocks.

    Attributes:
        part: float32, what their values are multiplied by.
        table: name of a stored tensor that has the values of their codes.
        offset: is added then.
    """

    part: Part
    table: str
    offset: np.float32


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor.

    Attributes:
        name: of the tensor without quantisation.
        shape: of it.
        order: its axes in the order in which they are stored, rows and columns last.
        arithmetic: what codes and scales stand for.
        codes: one integer per element.
        scales: one float per block.
        zeros: one integer per block, or None.
        whole: one more scale for each matrix, or None.
        groups: name of a stored tensor that says of every row or column which block it is in, where these do not
            follow each other.
        groups_axis: `ROWS` or `COLUMNS`.
        declared: name of a stored tensor that repeats `shape`, or None.
        nested: how scales are quantised, or None.
        unit: what products of codes and scales are multiplied by, in float32, or None.
        table: name of a stored tensor that repeats the values of codes, or None.
        dtype: of the tensor without quantisation.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    arithmetic: Arithmetic
    codes: Part
    scales: Part
    zeros: Part | None = None
    whole: Whole | None = None
    groups: str | None = None
    groups_axis: int = COLUMNS
    declared: str | None = None
    nested: Nested | None = None
    unit: np.float32 | None = None
    table: str | None = None
    dtype: np.dtype = BF16

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """`shape` in the stored order: (..., rows, columns)."""
        return tuple(self.shape[axis] for axis in self.order)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors whose content follows from that of the tensor."""
        whole = None if self.whole is None else self.whole.part
        nested = None if self.nested is None else self.nested.part
        return tuple(
            part for part in (self.codes, self.scales, self.zeros, whole, nested) if part is not None
        )

    @property
    def names(self) -> frozenset[str]:
        """All stored tensors."""
        tables = (self.table, None if self.nested is None else self.nested.table)
        others = (name for name in (self.groups, self.declared, *tables) if name is not None)
        return frozenset((*(part.tensor for part in self.parts), *others))

    @property
    def transposed(self) -> bool:
        """Whether elements that follow each other in the tensor lie in different stored rows."""
        return self.order[-1] != len(self.order) - 1

    @property
    def repeats_only(self) -> bool:
        """Whether a part of it cannot be quantised anew: a scale serves several rows, or other blocks' scales."""
        return any(part.run is not None for part in self.parts)

    @property
    def height(self) -> int:
        """Rows that can only be quantised together, as long as blocks follow each other."""
        return min(self.stored_shape[ROWS], math.lcm(*(math.prod(part.grain(ROWS)) for part in self.parts)))


class Format(Protocol):
    """How the tensors of one folder are quantised, as its config says."""

    @property
    def expected(self) -> str:
        """What a folder has in this format, for a message."""

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """The quantised tensors of a folder, and the names of all stored ones that have no place without quantisation.

        What is damaged is appended to `problems`.
        """


def part_problems(
    tensors: Mapping[str, TensorInfo],
    part: Part,
    what: str,
    of: str,
    elements: Sequence[int],
    dtypes: Sequence[str],
) -> Iterator[str]:
    """What is wrong with a stored tensor: `what` it has `of` another, for elements of a shape in the stored order."""
    info = tensors.get(part.tensor)
    if info is None:
        yield f"tensor {part.tensor} is missing, which has the {what} of {of}"
        return
    shape = part.stored(elements)
    if not same_but_ones(info.shape, shape):
        yield (f"tensor {info.name} has shape {list(info.shape)}, expected {list(shape)}: the {what} of {of}")
    if info.dtype not in dtypes:
        expected = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
        yield f"tensor {info.name} has dtype {info.dtype}, expected {expected}"


def same_but_ones(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether shapes are the same but for axes of 1, as the one scale of a tensor is () or (1,) or (1, 1)."""
    return [size for size in one if size != 1] == [size for size in other if size != 1]


def there_twice(plain: str, stored: str) -> str:
    """That a folder has a weight both unquantised and quantised."""
    return f"tensor {plain} is there twice, as it is and as {stored}: expected one of them"


def found_parts(
    tensors: Mapping[str, TensorInfo], hidden: set[str], endings: tuple[str, ...], problems: list[str]
) -> frozenset[str]:
    """The tensors of a folder that are parts of quantised ones, for `Format.find`.

    Args:
        tensors: of the folder.
        hidden: the parts of those that were found; names that the folder lacks do not count.
        endings: of parts; others that end so belong to nothing, which is appended to `problems`.
        problems: see there.
    """
    left = {name for name in tensors if name.endswith(endings)} - hidden
    problems += [f"tensor {name} goes with no quantised weight" for name in sorted(left)]
    return frozenset(hidden & tensors.keys() | left)


def check_fields(
    given: Mapping[str, Any], where: str, known: frozenset[str], choices: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuse fields of a config that are neither `known` nor `choices`, and other values of those.

    Raises:
        UserError: there is one.
    """
    fields = known | choices.keys()
    if unknown := ", ".join(repr(name) for name in sorted(given.keys() - fields)):
        raise UserError(f"{where} has unknown fields {unknown}; known are {', '.join(sorted(fields))}")
    for name, allowed in choices.items():
        value = given.get(name)
        if not any(value == one and type(value) is type(one) for one in allowed):
            expected = " or ".join(repr(one) for one in allowed if one is not None) or "none"
            raise UserError(f"{where}.{name} = {quote(value)} is not supported; expected {expected}")


def is_size(value: Any) -> bool:
    """Whether a value of a config is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
