"""Rotary position embeddings (Su et al., arXiv 2104.09864) and the usual ways to stretch them.

Frequencies follow the definitions of transformers' ``modeling_rope_utils``; those that depend on how long
the sequence is (dynamic, longrope) take the longest position in the batch, so they are computed in the graph. Who
reads a text in parts says how long all of it will be: what is rotated already cannot follow when frequencies change.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """NTK-aware base change that grows with the sequence beyond `max_positions`."""

    factor: float
    max_positions: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): interpolate low frequencies, keep high ones, ramp between.

    `attention_factor` multiplies cos and sin; it is already resolved from factor and mscale.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's piecewise scaling by wavelength."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): one divisor per frequency, another set beyond the original length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Only the first `rotating` pairs turn; frequencies are spread as if all did, then divided by `factor`."""

    rotating: int
    factor: float = 1.0


Scaling = Linear | Dynamic | Yarn | Llama3 | LongRope | Proportional | None


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotation of the first `rotary_dim` of the head's features.

    Attributes:
        interleaved: pairs are (2i, 2i + 1), else (i, i + rotary_dim/2).
        float32: angles and rotation in float32, whatever the activations are.
    """

    theta: float
    rotary_dim: int
    scaling: Scaling = None
    interleaved: bool = False
    float32: bool = False

    def shortest(self, length: int) -> int:
        """Tokens of the shortest text with the frequencies that one of `length` has."""
        match self.scaling:
            case Dynamic():
                return max(length, self.scaling.max_positions)
            case LongRope():
                return (
                    self.scaling.original_max_positions + 1
                    if length > self.scaling.original_max_positions
                    else 1
                )
        return 1

    def traits(self, width: int) -> Iterator[str]:
        """What sets it apart, on heads of `width`."""
        if self.rotary_dim != width:
            yield "partial rope"
        if self.interleaved:
            yield "interleaved rope"
        if self.scaling is not None:
            yield f"{type(self.scaling).__name__.lower()} rope"


def rope_tables(
    spec: RopeSpec, positions: jax.Array, dtype: jnp.dtype, length: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (B, T, rotary_dim/2), computed in float32 and rounded to `dtype` (or not: `float32`).

    Args:
        spec: the rotation.
        positions: (B, T) int32.
        dtype: dtype of the activations that will be rotated.
        length: () int32, tokens of the longest text; by default up to the last of the positions.
    """
    frequencies, attention_factor = _frequencies(spec, jnp.max(positions) + 1 if length is None else length)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    kept = jnp.float32 if spec.float32 else dtype
    cos, sin = (jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor)
    return cos.astype(kept), sin.astype(kept)


def apply_rope(
    spec: RopeSpec, x: Float[Array, "B T heads H"], tables: tuple[jax.Array, jax.Array]
) -> Float[Array, "B T heads H"]:
    """Rotate x (B, T, heads, H) by tables (B, T, rotary_dim/2); features past rotary_dim pass through."""
    cos, sin = (table[:, :, None, :] for table in tables)
    half = spec.rotary_dim // 2
    turning, rest = x[..., : 2 * half].astype(cos.dtype), x[..., 2 * half :]
    if spec.interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = jnp.stack(pair, axis=-1).reshape(turning.shape)
    else:
        first, second = turning[..., :half], turning[..., half:]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _inverse_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    # float32 throughout: transformers computes this table in float32, and at position 1e5 the difference to
    # float64 would show.
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.float32(1.0) / np.power(np.float32(theta), exponents)


def _frequencies(spec: RopeSpec, length: jax.Array | int) -> tuple[jax.Array, float]:
    """Inverse frequencies (rotary_dim/2,) and the factor on cos and sin, in texts of `length` tokens."""
    base = _inverse_frequencies(spec.theta, spec.rotary_dim)
    match spec.scaling:
        case None:
            return jnp.asarray(base), 1.0
        case Linear(factor):
            return jnp.asarray(base / np.float32(factor)), 1.0
        case Dynamic():
            return _dynamic(spec, spec.scaling, length), 1.0
        case Yarn():
            return jnp.asarray(_yarn(spec, spec.scaling, base)), spec.scaling.attention_factor
        case Llama3():
            return jnp.asarray(_llama3(spec.scaling, base)), 1.0
        case Proportional(rotating, factor):
            turning = np.arange(base.size) < rotating
            return jnp.asarray(np.where(turning, base, 0) / np.float32(factor)), 1.0
        case LongRope(short, long, original, attention_factor):
            divisor = jnp.where(length > original, jnp.asarray(long), jnp.asarray(short))
            return jnp.asarray(base) / divisor.astype(jnp.float32), attention_factor


def _dynamic(spec: RopeSpec, scaling: Dynamic, length: jax.Array | int) -> jax.Array:
    length = jnp.maximum(length, scaling.max_positions).astype(jnp.float32)
    growth = scaling.factor * length / scaling.max_positions - (scaling.factor - 1)
    theta = spec.theta * growth ** (spec.rotary_dim / (spec.rotary_dim - 2))
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    return 1.0 / theta**exponents


def _yarn(spec: RopeSpec, scaling: Yarn, base: np.ndarray) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        """The (fractional) feature that turns `rotations` times over the original context."""
        ratio = scaling.original_max_positions / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(spec.rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (base / scaling.factor * ramp + base * (1 - ramp)).astype(np.float32)


def _llama3(scaling: Llama3, base: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / base
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * base / scaling.factor + smooth * base
    scaled = np.where(
        wavelength > longest, base / scaling.factor, np.where(wavelength < shortest, base, between)
    )
    return scaled.astype(np.float32)
