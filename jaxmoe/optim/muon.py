"""Muon: momentum, orthogonalised matrix by matrix (Jordan 2024; Liu et al. 2025, arXiv 2502.16982)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxmoe.optim.orthogonalize import Coefficients, orthogonalize

Scale = Literal["rms", "jordan", "spectral"]
"""Names of the learning-rate scales; see `shape_scale`."""


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        momentum: exponential average of the gradients, float32, same tree and shapes as the parameters.
    """

    momentum: optax.Updates


def shape_scale(scale: Scale, out: int, in_: int) -> float:
    """Factor on the orthogonalised update of one (out, in) matrix.

    "rms" is 0.2·sqrt(max(out, in)): entries of the update then have a root mean square of about 0.2, like
    those of AdamW, so that both can share a learning rate (Liu et al. 2025). "jordan" is
    sqrt(max(1, out/in)) and "spectral" is sqrt(out/in).

    Raises:
        ValueError: unknown scale.
    """
    if scale == "rms":
        return 0.2 * math.sqrt(max(out, in_))
    if scale == "jordan":
        return math.sqrt(max(1.0, out / in_))
    if scale == "spectral":
        return math.sqrt(out / in_)
    raise ValueError(f"unknown scale {scale!r}, expected one of {get_args(Scale)}")


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    scale: Scale = "rms",
    coefficients: Coefficients = "you_jiacheng",
    freeze_idle: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Replace every gradient by its orthogonalised momentum times `shape_scale`.

    With gradient g and ``m ← μ m + (1 − μ) g``, the orthogonalised matrix is m, or ``μ m + (1 − μ) g`` with
    `nesterov`. A leaf (..., out, in) is a batch of matrices: an expert's update depends on no other expert,
    and the scale on no leading axis.

    Args:
        momentum: μ, in [0, 1).
        nesterov: look one step ahead.
        scale: see `shape_scale`.
        coefficients: see `orthogonalize`.
        freeze_idle: give a matrix whose gradient is exactly zero (an expert that got no token) no update in
            that step. Otherwise it moves at full size, however old its momentum: orthogonalisation forgets
            magnitudes. Decay of weights and of momentum goes on either way.
        dtype: dtype of the Newton–Schulz products. Momentum is float32 in any case.

    Returns:
        A transformation whose updates are float32. Its `init` raises ValueError for a leaf with fewer than
        two dimensions.

    Raises:
        ValueError: `momentum` outside [0, 1), unknown `scale` or `coefficients`.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), found {momentum}")
    shape_scale(scale, 1, 1)
    if coefficients not in get_args(Coefficients):
        raise ValueError(f"unknown coefficients {coefficients!r}, expected one of {get_args(Coefficients)}")

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            if leaf.ndim < 2:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"Muon takes matrices (..., out, in), found params{name} of {leaf.shape}")
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params))

    def step(gradient: jax.Array, average: jax.Array) -> jax.Array:
        ahead = _average(gradient, average, momentum) if nesterov else average
        update = shape_scale(scale, *gradient.shape[-2:]) * orthogonalize(ahead, coefficients, dtype=dtype)
        if freeze_idle:
            update = jnp.where(jnp.any(gradient != 0.0, axis=(-2, -1), keepdims=True), update, 0.0)
        return update

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        averages = jax.tree.map(lambda g, m: _average(g, m, momentum), gradients, state.momentum)
        steps = jax.tree.map(lambda g, m: _layer_by_layer(step, g, m), gradients, averages)
        return steps, MuonState(averages)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    scale: Scale = "rms",
    coefficients: Coefficients = "you_jiacheng",
    weight_decay: float = 0.0,
    freeze_idle: bool = False,
) -> optax.GradientTransformation:
    """Muon with decoupled weight decay: ``W ← W − lr·(scale·orthogonalised + weight_decay·W)``.

    For trees of matrices only; `jaxmoe.optim.build_optimizer` gives every other parameter to AdamW.

    Args:
        learning_rate: a number, or a schedule from the step (first step: 0) to a number.
        momentum, nesterov, scale, coefficients, freeze_idle: see `scale_by_muon`.
        weight_decay: fraction of a weight that is removed per unit of learning rate.

    Returns:
        A transformation whose `update` needs the parameters when `weight_decay` is not zero.
    """
    direction = scale_by_muon(
        momentum=momentum,
        nesterov=nesterov,
        scale=scale,
        coefficients=coefficients,
        freeze_idle=freeze_idle,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def _average(gradient: jax.Array, average: jax.Array, momentum: float) -> jax.Array:
    return momentum * average + (1.0 - momentum) * gradient


def _layer_by_layer(
    step: Callable[[jax.Array, jax.Array], jax.Array], gradient: jax.Array, average: jax.Array
) -> jax.Array:
    """Take stacks of stacks, (L, E, ..., out, in), one layer at a time.

    The iteration needs a few copies of what it works on: one layer of experts keeps the device busy and a
    whole model of them would fill its memory. A plain stack (L, out, in) is one batch.
    """
    if gradient.ndim < 4:
        return step(gradient, average)
    return jax.lax.map(lambda pair: step(*pair), (gradient, average))
