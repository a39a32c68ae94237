"""Where the letters of a quantised tensor's parameter lie as it is stored."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jaxmoe.interop.quantization.stored_form import QuantizedTensor
from jaxmoe.interop.rules import Binding
from jaxmoe.interop.storage.slices import Box, runs


@dataclasses.dataclass(frozen=True)
class StoredOrder:
    """The letters of a quantised tensor's binding in the order in which it is stored."""

    tensor: QuantizedTensor
    binding: Binding

    @functools.cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each stored axis."""
        return tuple(self.binding.axes[axis] for axis in self.tensor.order)

    def parts(self, band: Box) -> Iterator[dict[str, slice]]:
        """Parts of the parameter, a slice per letter, whose rows follow each other in `band`.

        Rows may be several letters fused, of which a band begins and ends anywhere.
        """
        size_of = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        boxes: list[Box] = [()]
        for letters, part in zip(self.axes, band, strict=True):
            finer = list(runs([size_of[letter] for letter in letters], part.start, part.stop))
            boxes = [(*box, *more) for box in boxes for more in finer]
        order = [letter for group in self.axes for letter in group]
        for box in boxes:
            of_letter = dict(zip(order, box, strict=True))
            yield self.binding.within([of_letter[letter] for letter in self.binding.letters])

    def rows(self, part: np.ndarray) -> np.ndarray:
        """A part in the parameter's own order of the letters → (rows, columns)."""
        dims = self.binding.declared.dims
        order = [dims.index(letter) for group in self.axes for letter in group]
        fixed = [dims.index(letter) for letter in self.binding.index]  # of length 1
        return part.transpose([*fixed, *order]).reshape(-1, self.tensor.stored_shape[-1])
