"""Block FP8: float8_e4m3 codes and one scale per block of a matrix, as DeepSeek-V3 introduced it (arXiv 2412.19437).

``X`` (F8_E4M3, out × in) and ``X_scale_inv`` (ceil(out / rows) × ceil(in / columns)): a number is its code times the
scale of its block, in float32, rounded to bfloat16. Quantised anew, the scale is the block's largest number over 448
(float8_e4m3's largest), with ``scale_fmt: ue8m0`` the next power of two above that, and numbers are rounded to nearest,
ties to even.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.quantization.block_format import (
    BF16,
    Pair,
    per_block,
    per_element,
    power_of_two_above,
    scale_problems,
    unknown_fields,
)
from jaxmoe.interop.storage.format import TensorInfo
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.slices import finer_axes, positions

_SUFFIX = "_scale_inv"
_CODES = "F8_E4M3"
_SCALES = ("F32", "BF16", "F8_E8M0")
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = float(ml_dtypes.finfo(_E4M3).max)
_VALUES = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)

# Which tensors are quantised, their own dtypes say; how activations would be, does not matter in bfloat16.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
}
_KNOWN = frozenset(_CHOICES) | {
    "quant_method",
    "weight_block_size",
    "modules_to_not_convert",
    "modules_to_convert",
    "ignored_layers",
    "dequantize",
}


@dataclasses.dataclass(frozen=True)
class BlockFP8:
    """The format with one size of blocks.

    Attributes:
        block: rows and columns that share a scale.
        powers: scales are powers of two.
    """

    block: tuple[int, int]
    powers: bool = False

    @classmethod
    def from_config(cls, given: Mapping[str, Any], where: str) -> Self:
        """From a ``quantization_config``.

        Raises:
            UserError: a field that is unknown or of another value than those supported.
        """
        if unknown := unknown_fields(given, _KNOWN):
            raise UserError(f"{where} has unknown fields {unknown}; known are {', '.join(sorted(_KNOWN))}")
        for name, allowed in _CHOICES.items():
            if given.get(name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed if choice is not None)
                raise UserError(f"{where}.{name} = {quote(given[name])} is not supported; expected {choices}")
        block = given.get("weight_block_size")
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(map(_positive, block)):
            raise UserError(
                f"{where}.weight_block_size = {quote(block)}: expected two positive integers, rows and columns of a "
                "block; other granularities are not supported"
            )
        return cls((block[0], block[1]), given.get("scale_fmt") == "ue8m0")

    def find(
        self, tensors: Mapping[str, TensorInfo], problems: list[str]
    ) -> tuple[list[Pair], frozenset[str]]:
        """See `Format`."""
        pairs, stored = [], set()
        for name, info in tensors.items():
            if info.dtype == _CODES:
                pair = Pair(name, info.shape, name, name + _SUFFIX, tuple(range(len(info.shape))))
                pairs.append(pair)
                stored |= {pair.codes, pair.scales}
                if len(info.shape) < 2 or 0 in info.shape:
                    problems.append(
                        f"tensor {name} has shape {list(info.shape)}, expected matrices to have scales of"
                    )
                else:
                    shape = self._scales_shape(info.shape)
                    problems += scale_problems(pair, tensors.get(pair.scales), shape, _SCALES)
            elif name.endswith(_SUFFIX):
                stored.add(name)
                codes = tensors.get(name.removesuffix(_SUFFIX))
                if codes is None:
                    problems.append(f"tensor {name} has scales, but there is no {name.removesuffix(_SUFFIX)}")
                elif codes.dtype != _CODES:
                    problems.append(
                        f"tensor {codes.name} has dtype {codes.dtype}, expected {_CODES}: {name} has scales of it"
                    )
        return pairs, frozenset(stored & tensors.keys())

    def read(
        self, stored: CheckpointFolder, pair: Pair, sizes: Sequence[int], box: Sequence[slice]
    ) -> np.ndarray:
        """See `Format`."""
        codes = stored.read_box(pair.codes, sizes, box)
        if not codes.size:
            return np.empty(codes.shape, BF16)
        at = [positions(sizes, box, axes) for axes in finer_axes(pair.shape, sizes)]
        *lead, rows, columns = at
        blocks = [*lead, rows // self.block[0], columns // self.block[1]]
        cover = [slice(int(index[0]), int(index[-1]) + 1) for index in blocks]
        scales = stored.read_box(pair.scales, self._scales_shape(pair.shape), cover).astype(np.float32)
        values = _VALUES[codes.view(np.uint8)].reshape([len(index) for index in at])
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales[np.ix_(*(index - index[0] for index in blocks))]
            return values.astype(BF16).reshape(codes.shape)

    def encode(self, values: np.ndarray, scales: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """See `Format`."""
        largest = per_block(np.maximum, np.abs(values), self.block)
        # 1 for a block of zeros, and never a subnormal, which devices flush to zero.
        exact = np.where(largest > 0, np.maximum(largest / np.float32(_LARGEST), 2.0**-126), np.float32(1))
        if self.powers or scales == np.dtype(ml_dtypes.float8_e8m0fnu):
            exact = np.ldexp(np.float32(1), power_of_two_above(exact))
        rounded = exact.astype(scales)
        scaled = values / per_element(rounded.astype(np.float32), self.block, values.shape)
        return scaled.astype(
            _E4M3
        ), rounded  # a scale rounded down leaves at most 450, which is rounded to 448

    def _scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        *lead, rows, columns = shape
        return (*lead, -(-rows // self.block[0]), -(-columns // self.block[1]))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
