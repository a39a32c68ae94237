"""AWQ (arXiv 2306.00978) as AutoAWQ stores it in its version ``gemm``: 4 bits, eight columns to an int32.

``X.qweight`` (I32, in × out / 8), ``X.qzeros`` (I32, in / group × out / 8) and ``X.scales`` (F16, in / group × out): a
number is its code less the zero point, times the scale. The columns of an int32 are in the order 0, 2, 4, 6, 1, 3, 5, 7
from its lowest bits up.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxmoe.interop.quantization.arithmetic import Integers
from jaxmoe.interop.quantization.qweight import check_config, find_qweights, group_size
from jaxmoe.interop.quantization.stored_form import COLUMNS, Packing, Part, QuantizedTensor
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

_BITS = 4
_PACKING = Packing((0, 16, 4, 20, 8, 24, 12, 28), _BITS, COLUMNS)
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bits": (_BITS,),
    "zero_point": (True, False, None),
    "version": ("gemm", "GEMM", None),
    "format": ("gemm", None),
    "checkpoint_format": ("gemm", None),
    "pack_dtype": ("int32", None),
    "lm_head": (False, None),
}


@dataclasses.dataclass(frozen=True)
class AWQ:
    """The format.

    Attributes:
        group: rows that share a scale, None for all.
        symmetric: zero points are in the middle of the codes.
    """

    group: int | None
    symmetric: bool

    expected = "weights X.qweight with X.qzeros and X.scales"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        check_config(given, where, _CHOICES)
        return cls(group_size(given, where), given.get("zero_point") is False)

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        return find_qweights(stored.tensors, problems, self._described)

    def _described(self, codes: TensorInfo, stem: str) -> QuantizedTensor:
        rows, words = codes.shape
        step = (self.group or rows, 1)
        return QuantizedTensor(
            f"{stem}.weight",
            (words * len(_PACKING.shifts), rows),
            (1, 0),
            Integers(_BITS, zeros=True, symmetric=self.symmetric),
            Part(codes.name, packing=_PACKING),
            Part(f"{stem}.scales", step),
            Part(f"{stem}.qzeros", step, _PACKING),
        )
