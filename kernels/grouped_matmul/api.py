"""The public grouped matmul: checks, choice of backend, gradients.

A backend is a module with the two functions that `xla` has, `matmul` and `weight_gradient`. It raises
NotImplementedError for operands that it cannot take, and the next one is asked.
"""

from __future__ import annotations

import functools
import itertools
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from jaxmoe.kernels.grouped_matmul import reference, xla
from jaxmoe.kernels.logs import log_once

if TYPE_CHECKING:  # not needed to run, and not everywhere where kernels are measured
    from jaxtyping import Array, Float, Int

_logger = logging.getLogger(__name__)

# In the order in which they are asked. The last one takes everything.
_BACKENDS: dict[str, ModuleType] = {"xla": xla}

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def grouped_matmul(
    x: Float[Array, "R D"],
    weights: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    *,
    backend: str | None = None,
) -> Float[Array, "R F"]:
    """out[r] = weights[g(r)] @ x[r], where g(r) is the group of row r.

    Differentiable in x and weights, in reverse mode only. A frozen operand costs no gradient. The
    gradient of the weights of a group without rows is exactly zero.
    Inside shard_map the operands may vary over different mesh axes: the output varies over all of them, and
    the gradient of an operand is summed over those that it does not vary over.

    Args:
        x: (R, D) rows sorted by group: the first group_sizes[0] rows belong to group 0, and so on.
        weights: (E, F, D), in x's dtype: one matrix (out, in) for each group.
        group_sizes: (E,) int32, none negative. They may sum to less than R: the rows after them belong to no
            group, may hold anything (nan too), give zeros and receive zero gradient. Sizes that go past R
            are cut there.
        backend: "xla", or "reference" (slow, for tests); by default the first one that takes the operands.

    Returns:
        (R, F) in x's dtype, accumulated in float32 (float64 for float64 operands).

    Raises:
        ValueError: for shapes that do not fit each other, or an unknown backend.
        TypeError: for dtypes other than those named here.
        NotImplementedError: when the backend asked for by name cannot take the operands.
    """
    _check_operands(x, weights, group_sizes)
    if backend is not None and backend != "reference" and backend not in _BACKENDS:
        known = ", ".join(sorted([*_BACKENDS, "reference"]))
        raise ValueError(f"backend is {backend!r}; expected one of {known}, or None to choose one")
    if backend == "reference":
        return reference.grouped_matmul(x, weights, group_sizes)
    candidates = tuple(_BACKENDS) if backend is None else (backend,)
    return _grouped_matmul(candidates, *_vary_alike(x, weights, group_sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    candidates: tuple[str, ...], x: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return _call_first(candidates, "matmul", x, weights, group_sizes, transpose=False)


def _forward(
    candidates: tuple[str, ...], x: CustomVJPPrimal, weights: CustomVJPPrimal, group_sizes: CustomVJPPrimal
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None, jax.Array]]:
    out = _grouped_matmul(candidates, x.value, weights.value, group_sizes.value)
    # Each gradient needs the other operand: with frozen weights, x need not be kept for the backward pass.
    x_kept = x.value if weights.perturbed else None
    weights_kept = weights.value if x.perturbed else None
    return out, (x_kept, weights_kept, group_sizes.value)


def _backward(
    candidates: tuple[str, ...],
    residuals: tuple[jax.Array | None, jax.Array | None, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None, None]:
    x, weights, group_sizes = residuals
    dx = dweights = None
    if weights is not None:
        dx = _call_first(candidates, "matmul", dy, weights, group_sizes, transpose=True)
    if x is not None:
        dweights = _call_first(candidates, "weight_gradient", x, dy, group_sizes)
    return dx, dweights, None


# symbolic_zeros is what tells _forward which operands are differentiated.
_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _call_first(
    candidates: tuple[str, ...], function: str, *operands: jax.Array, **options: Any
) -> jax.Array:
    """Call `function` of the first candidate that takes the operands."""
    for name, following in itertools.pairwise(candidates):
        try:
            return getattr(_BACKENDS[name], function)(*operands, **options)
        except NotImplementedError as error:
            message = f"grouped_matmul: backend {name} passes {function} on to {following}: {error}"
            log_once(_logger, logging.WARNING, message)
    return getattr(_BACKENDS[candidates[-1]], function)(*operands, **options)


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Make all operands vary over the mesh axes that any of them varies over inside shard_map.

    Done outside of the custom gradient: the gradient of a replicated operand has to be summed over the
    replicas, which is the transpose of pcast.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    missing = [tuple(sorted(frozenset().union(*varying) - own, key=str)) for own in varying]
    return [
        jax.lax.pcast(operand, axes, to="varying") if axes else operand
        for operand, axes in zip(operands, missing, strict=True)
    ]


def _check_operands(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> None:
    if x.ndim != 2 or weights.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"x is {x.shape}, weights {weights.shape}, group_sizes {group_sizes.shape}; "
            "expected (rows, in), (groups, out, in) and (groups,)"
        )
    if weights.shape[2] != x.shape[1]:
        raise ValueError(
            f"weights {weights.shape} contract over their last dimension, {weights.shape[2]}, but the rows "
            f"of x {x.shape} have {x.shape[1]}: weights are (groups, out, in)"
        )
    if weights.shape[0] != group_sizes.shape[0] or weights.shape[0] == 0:
        raise ValueError(
            f"weights {weights.shape} hold {weights.shape[0]} groups and group_sizes {group_sizes.shape} "
            f"{group_sizes.shape[0]}; expected one size for each group, and at least one group"
        )
    if x.dtype != weights.dtype or x.dtype.name not in _DTYPES:
        raise TypeError(
            f"x is {x.dtype} and weights are {weights.dtype}; expected both in the same of "
            f"{', '.join(_DTYPES)}: cast one of them with astype"
        )
    if group_sizes.dtype != jnp.int32:
        raise TypeError(
            f"group_sizes are {group_sizes.dtype}; expected int32: cast them with astype('int32')"
        )
