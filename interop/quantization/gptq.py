"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it: 4 or 8 bits, packed into int32 along the rows.

``X.qweight`` (I32, in · bits / 32 × out), ``X.qzeros`` (I32, groups × out · bits / 32), ``X.scales`` (F16, groups ×
out) and ``X.g_idx`` (I32, in), the group of each row, which are in no order after ``desc_act``: a number is its code
less the zero point of its group, times the scale. In the first version of the format (``checkpoint_format: gptq``) zero
points are stored less one, in ``gptq_v2`` as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxmoe.interop.quantization.arithmetic import Integers
from jaxmoe.interop.quantization.qweight import check_config, find_qweights, group_size
from jaxmoe.interop.quantization.stored_form import (
    COLUMNS,
    ROWS,
    Part,
    QuantizedTensor,
    packed,
)
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder

_VERSIONS = ("gptq", "gptq_v2", None)
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "checkpoint_format": _VERSIONS,
    "format": _VERSIONS,
    "sym": (True, False, None),
    "desc_act": (True, False, None),
    "is_marlin_format": (False, None),
    "pack_dtype": ("int32", None),
    "lm_head": (False, None),
}


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """The format.

    Attributes:
        bits: of a code.
        group: rows that share a scale, None for all.
        symmetric: zero points are in the middle of the codes.
        less_one: zero points are stored less one.
    """

    bits: int
    group: int | None
    symmetric: bool
    less_one: bool

    expected = "weights X.qweight with X.qzeros, X.scales and X.g_idx"

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        check_config(given, where, _CHOICES)
        version = given.get("checkpoint_format") or given.get("format") or "gptq"
        symmetric = given.get("sym") is not False
        return cls(given["bits"], group_size(given, where), symmetric, version == "gptq")

    def find(
        self, stored: CheckpointFolder, problems: list[str]
    ) -> tuple[list[QuantizedTensor], frozenset[str]]:
        """See `Format`."""
        return find_qweights(stored.tensors, problems, self._described)

    def _described(self, codes: TensorInfo, stem: str) -> QuantizedTensor:
        along_rows = packed(32, self.bits, ROWS)
        # The libraries take the one from the whole int32: a zero point of 0 borrows from its neighbour.
        ones = sum(1 << shift for shift in along_rows.shifts) if self.less_one else 0
        rows, columns = codes.shape[0] * len(along_rows.shifts), codes.shape[1]
        step = (self.group or rows, 1)
        return QuantizedTensor(
            f"{stem}.weight",
            (columns, rows),
            (1, 0),
            Integers(self.bits, zeros=True, symmetric=self.symmetric, least_zero=int(self.less_one)),
            Part(codes.name, packing=along_rows),
            Part(f"{stem}.scales", step),
            Part(f"{stem}.qzeros", step, packed(32, self.bits, COLUMNS, ones)),
            groups=f"{stem}.g_idx",
            groups_axis=ROWS,
        )
