"""What a block format is: matrices of few bits per number, with one scale for each block of numbers.

A quantised tensor is stored as two: codes and scales. Both have the matrix' rows last but its columns, whatever the
order of the axes in the unquantised tensor: (..., rows, columns). `jaxmoe.interop.quantization.folder` presents them as
one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A quantised tensor.

    Attributes:
        name: of the tensor without quantisation.
        shape: of it.
        codes: name of the stored tensor that has the codes.
        scales: name of the stored tensor that has the scales.
        order: its axes in the order in which they are stored, rows and columns last.
    """

    name: str
    shape: tuple[int, ...]
    codes: str
    scales: str
    order: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """`shape` in the stored order: (..., rows, columns)."""
        return tuple(self.shape[axis] for axis in self.order)


class Format(Protocol):
    """One block format."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale; blocks at the edges may have fewer."""

    def find(
        self, tensors: Mapping[str, TensorInfo], problems: list[str]
    ) -> tuple[list[Pair], frozenset[str]]:
        """The quantised tensors of a folder, and the names of all the stored ones that they are made of.

        What is damaged is appended to `problems`.
        """

    def read(
        self, stored: CheckpointFolder, pair: Pair, sizes: Sequence[int], box: Sequence[slice]
    ) -> np.ndarray:
        """The part `box` of the unquantised tensor seen with axes `sizes`, in bfloat16."""

    def encode(self, values: np.ndarray, scales: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales (of dtype `scales`) of a float32 matrix (rows, columns)."""


def per_block(function: np.ufunc, values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Reduce each block of a matrix with a ufunc."""
    for axis, length in enumerate(block):
        values = function.reduceat(values, np.arange(0, values.shape[axis], length), axis)
    return values


def per_element(blocks: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Repeat what there is one of per block, for every element of a matrix of `shape`."""
    for axis, length in enumerate(block):
        blocks = blocks.repeat(length, axis)
    return blocks[: shape[0], : shape[1]]


def power_of_two_above(values: np.ndarray) -> np.ndarray:
    """Exponents of the smallest powers of two that positive `values` do not exceed."""
    mantissas, exponents = np.frexp(values.astype(np.float64))
    return exponents - (mantissas == 0.5)


def scale_problems(
    pair: Pair,
    scales: TensorInfo | None,
    shape: Sequence[int],
    dtypes: Sequence[str],
) -> Iterator[str]:
    """What is wrong with the scales of a tensor."""
    if scales is None:
        yield f"tensor {pair.scales} is missing, which has the scales of {pair.codes}"
        return
    if scales.shape != tuple(shape):
        yield (
            f"tensor {pair.scales} has shape {list(scales.shape)}, expected {list(shape)}: the scales of "
            f"{pair.codes}"
        )
    if scales.dtype not in dtypes:
        expected = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
        yield f"tensor {pair.scales} has dtype {scales.dtype}, expected {expected}"


def unknown_fields(given: Mapping[str, Any], known: frozenset[str]) -> str:
    """The fields of a config that are not `known`, quoted; empty if there are none."""
    return ", ".join(repr(name) for name in sorted(given.keys() - known))
