"""Orthogonalisation of stacks of matrices by Newton–Schulz iteration."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmoe.parallel.sharding import current_mesh

Coefficients = Literal["you_jiacheng", "jordan", "polar_express"]
"""Names of the coefficient sets; see `orthogonalize`."""

Polynomial = tuple[float, float, float]

# One odd polynomial a*s + b*s^3 + c*s^5 per step, applied to every singular value s in (0, 1].
_POLYNOMIALS: dict[str, tuple[Polynomial, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "you_jiacheng": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.15655, -22.48329, 15.87877),
        (4.04293, -2.80892, 0.50002),
        (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449),
        (2.34654, -1.70978, 0.42324),
    ),
}
# The Polar Express polynomials leave their basin for a singular value even slightly above one, which
# rounding in bfloat16 can produce.
_NORM_MARGIN = {"jordan": 1.0, "you_jiacheng": 1.0, "polar_express": 1.02}


def orthogonalize(
    x: Float[Array, "*batch out in"],
    coefficients: Coefficients = "you_jiacheng",
    steps: int | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out in"]:
    """Replace the singular values of every matrix by values near one: U S Vᵀ becomes about U Vᵀ.

    Every matrix is divided by its own Frobenius norm, then each step computes
    ``X ← a X + (b A + c A²) X`` with ``A = X Xᵀ`` over the smaller side of the matrix. Five steps bring
    singular values of at least 1/100 of the norm to .98–1.03 ("you_jiacheng", You 2025; other libraries say "quintic",
    which all of these are), .68–1.13 ("jordan", Jordan 2024) or .86–1.14 ("polar_express", Amsel et al. 2025, arXiv
    2505.16932). Matrices never mix: each leading index is its own problem.

    Args:
        x: (..., out, in), floating point. Every axis before the last two is batch.
        coefficients: the polynomial set.
        steps: number of steps; by default all of the set. More than the set has repeats its last polynomial.
        dtype: dtype of the products; by default bfloat16 for bfloat16 input and float32 for any other.
            Norms are always float32.

    Returns:
        The same shape and dtype as `x`. A matrix of zeros stays zeros; one that holds a nan or an infinity
        becomes nan, and only that one.

    Raises:
        ValueError: fewer than two dimensions, an unknown set, or `steps` below one.
        TypeError: `x` is not real floating point.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs (..., out, in), found shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"orthogonalize needs a floating point array, found {x.dtype}")
    polynomials = _schedule(coefficients, steps)
    if dtype is None:
        dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    tall = x.shape[-2] > x.shape[-1]
    y = _unit_norm(x.mT if tall else x, _NORM_MARGIN[coefficients]).astype(dtype)

    def polynomial(y: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = y @ y.mT
        return a * y + (b * gram + c * (gram @ gram)) @ y, None

    # As a loop it is compiled once: unrolled, it would be a sixth of a whole training step's program. On a mesh the
    # partitioner gives what a loop carries more memory: 10 GB more of each GPU for Qwen3-30B on eight.
    unroll = 1 if current_mesh() is None else len(polynomials)
    y, _ = jax.lax.scan(polynomial, y, jnp.asarray(polynomials, dtype), unroll=unroll)
    return (y.mT if tall else y).astype(x.dtype)


def _schedule(coefficients: str, steps: int | None) -> tuple[Polynomial, ...]:
    if coefficients not in _POLYNOMIALS:
        raise ValueError(f"unknown coefficients {coefficients!r}, expected one of {get_args(Coefficients)}")
    polynomials = _POLYNOMIALS[coefficients]
    if steps is None:
        return polynomials
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    return (*polynomials, *[polynomials[-1]] * (steps - len(polynomials)))[:steps]


def _unit_norm(x: jax.Array, margin: float) -> jax.Array:
    """Each matrix over its Frobenius norm times `margin`, in float32; zeros for a matrix of zeros."""
    x = x.astype(jnp.float32)
    # The largest entry first: squares of entries below 1e-19 or above 1e19 leave float32.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    tiny = jnp.finfo(jnp.float32).tiny
    x = jnp.where(largest < tiny, 0.0, x / jnp.where(largest < tiny, 1.0, largest))
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / (margin * jnp.where(largest < tiny, 1.0, norm))
