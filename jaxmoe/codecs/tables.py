"""The code books of four bits, and bitsandbytes' of quantised scales, and how codes are found in them.

A number that is as far from two values gets the lower one of nf4 and fp4, of the others the one of even code.
"""

from types import MappingProxyType, ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

_NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
_FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)

VALUES = MappingProxyType(
    {"nf4": np.array(_NF4.split(), np.float32), "fp4": np.concatenate([_FP4, np.float32(0) - _FP4])}
)
"""bitsandbytes' value of each of the 16 codes, float32, by kind: ascending in nf4, in fp4 the sign in the high bit."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BOOKS = MappingProxyType({**VALUES, "mxfp4": np.concatenate([2 * _E2M1, -2 * _E2M1])})
"""Those of mxfp4 are doubled: half of its largest scale, 2^128, is a float32."""

# Codes by ascending value. The fp4 codes 8 and 0 both stand for 0; numbers just above 0 get 8 on a CPU.
_ORDER = {"nf4": np.arange(16), "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])}
ZERO = MappingProxyType({"nf4": 7, "fp4": 0, "mxfp4": 0})
"""The code of 0."""


def namespace(array: Any) -> ModuleType:
    """numpy for its own arrays, jax.numpy for others."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def nearest(scaled: Any, kind: str) -> Any:
    """Codes of float32 numbers of [-1, 1], uint8."""
    xp = namespace(scaled)
    order = _ORDER[kind]
    values = VALUES[kind][order]
    codes = xp.full(scaled.shape, order[0], xp.uint8)
    for bound, step in zip((values[:-1] + values[1:]) / 2, np.diff(order).astype(np.uint8), strict=True):
        codes = codes + (scaled > bound).astype(xp.uint8) * step  # modulo 256
    return codes


def nearest_e2m1(scaled: Any) -> Any:
    """Codes of float4_e2m1 of float32 numbers of [-6, 6], uint8."""
    xp = namespace(scaled)
    size, codes = xp.abs(scaled), xp.zeros(scaled.shape, xp.uint8)
    for code, bound in enumerate((_E2M1[:-1] + _E2M1[1:]) / 2):
        codes += ((size >= bound) if code % 2 else (size > bound)).astype(xp.uint8)
    return codes | (xp.signbit(scaled).astype(xp.uint8) << 3)


def values_of(codes: Any, kind: str) -> Any:
    """Values of codes below 16, float32; of mxfp4 twice as large.

    For jax a tree of selects, which XLA vectorises on a CPU where it does not vectorise a gather.
    """
    if namespace(codes) is np:
        return _BOOKS[kind][codes]
    # Arrays of a constant that are made of the codes: others jax moves out of a differentiated loop over layers, where
    # each of the 16 is as large as the result.
    zeros = (codes & 0).astype(jnp.float32)
    level: list[Any] = [zeros + value for value in _BOOKS[kind]]
    for bit in range(4):
        is_set = (codes >> bit) & 1 != 0
        level = [jnp.where(is_set, one, zero) for zero, one in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _dynamic() -> np.ndarray:
    """The signed 8-bit dynamic map (arXiv 1511.04561): seven decades, each with twice the values of the one below.

    The boundaries of a decade are counted from its nearer end with one rounding, as torch.linspace does it.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    low, high = np.float32(0.1), np.float32(1)
    for decade in range(7):
        count = 2**decade
        step, place = float((high - low) / np.float32(count)), np.arange(count + 1)
        rising, falling = float(low) + step * place, float(high) - step * (count - place)
        bounds = np.where(place < (count + 1) // 2, rising, falling).astype(np.float32)
        middles = np.float32(10.0 ** (decade - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


DYNAMIC = _dynamic()
"""Value of each of the 256 codes in which scales are quantised, float32, ascending."""


def _even_bounds(values: np.ndarray) -> np.ndarray:
    bounds = (values[:-1] + values[1:]) * np.float32(0.5)
    # A number at a bound goes up where the code below is odd: it lies above the next smaller float32.
    bounds[1::2] = np.nextafter(bounds[1::2], np.float32(-2))
    return bounds


_DYNAMIC_BOUNDS = _even_bounds(DYNAMIC)


def nearest_dynamic(scaled: Any) -> Any:
    """Codes in `DYNAMIC` of float32 numbers of [-1, 1], uint8.

    As bitsandbytes searches on a GPU. On a CPU it looks a code up by the number rounded to 16 bits, and now and then
    misses the nearest one.
    """
    xp = namespace(scaled)
    return xp.searchsorted(xp.asarray(_DYNAMIC_BOUNDS), scaled, side="left").astype(xp.uint8)
