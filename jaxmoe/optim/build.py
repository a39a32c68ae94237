"""From a configuration and the roles of parameters to one optimiser."""

import contextlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from jaxmoe.config import OptimizerConfig
from jaxmoe.optim.muon import muon
from jaxmoe.params import Role, is_none, named

ROLES = get_args(Role)
_LINEAR = ("matrix", "router", "embedding")


def schedule(config: OptimizerConfig, total_steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate of every step, counted from 0.

    It rises linearly from peak/warmup_steps in step 0 to the peak in step warmup_steps − 1, then falls along
    a half cosine or a line to final_fraction·peak in step total_steps − 1, and stays there; or stays at the
    peak.

    Args:
        config: gives ``schedule``, ``learning_rate``, ``warmup_steps`` and ``final_fraction``.
        total_steps: length of the run in optimiser steps.
        peak: the highest learning rate; by default ``config.learning_rate``.
    """
    top = config.learning_rate if peak is None else peak
    last_of_warmup = max(config.warmup_steps - 1, 0)
    length = max(total_steps - 1 - last_of_warmup, 1)

    def learning_rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1.0) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - last_of_warmup) / length, 0.0, 1.0)
        if config.schedule == "constant":
            remaining = jnp.ones_like(progress)
        elif config.schedule == "linear":
            remaining = 1.0 - progress
        else:
            remaining = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return top * warmup * (config.final_fraction + (1.0 - config.final_fraction) * remaining)

    return learning_rate


def build_optimizer(
    config: OptimizerConfig, roles: Any, total_steps: int, rates: Any = None
) -> optax.GradientTransformation:
    """The optimiser of a run: global-norm clipping, then Muon or AdamW by role, each with its schedule.

    | role | ``name: adamw`` | ``name: muon`` | weight decay |
    |---|---|---|---|
    | matrix | AdamW | Muon | yes |
    | router | AdamW | ``router:`` muon or adamw | yes |
    | embedding (and output head) | AdamW | AdamW | yes |
    | convolution | AdamW | AdamW | yes |
    | vector, decay | AdamW | AdamW | no |
    | constant (a run does not even ask) | none | none | no |

    A matrix with a side of one has a single singular value and goes to AdamW. State is float32, whatever the
    dtype of parameters and gradients; updates are float32 and `optax.apply_updates` rounds them.

    Args:
        config: the ``optimizer`` section of a run.
        roles: a tree of role names with the structure of the parameters (`jaxmoe.params.roles`). Where the
            optimiser is given None for a parameter, that one is frozen and has no state.
        total_steps: length of the run in optimiser steps, for the schedule.
        rates: a tree like `roles` of factors on the learning rates; by default all are 1.

    Returns:
        A transformation whose `update` needs the parameters. Its `init` raises ValueError when the
        parameters and `roles` differ in structure, or when a matrix has fewer than two dimensions.

    Raises:
        ValueError: an unknown role.
    """
    unknown = [f"{name}: {role!r}" for name, role in named(roles) if role not in ROLES]
    if unknown:
        raise ValueError(f"unknown roles, expected one of {ROLES}: {'; '.join(unknown)}")
    adam_peak = config.adam_learning_rate
    transforms = {
        "decayed": _adamw(config, schedule(config, total_steps, adam_peak), config.weight_decay),
        "plain": _adamw(config, schedule(config, total_steps, adam_peak), 0.0),
        "none": optax.set_to_zero(),
    }
    if config.name == "muon":
        transforms["muon"] = muon(
            schedule(config, total_steps),
            momentum=config.momentum,
            nesterov=config.nesterov,
            scale=config.scale,
            coefficients=config.coefficients,
            weight_decay=config.weight_decay,
            freeze_idle=config.freeze_idle,
        )
    labels = lambda params: _labels(config, roles, params)
    clip = optax.identity() if config.clip_norm is None else _clip(config.clip_norm)
    own_rates = optax.identity() if rates is None else _scale_by(rates)
    return _in_float32(optax.chain(clip, optax.partition(transforms, labels), own_rates))


def _scale_by(factors: Any) -> optax.GradientTransformation:
    """Multiply every update by a factor of its own; both groups' last step is the learning rate, decay included."""
    scale = lambda factor, update: None if update is None else factor * update
    return optax.stateless(lambda updates, _: jax.tree.map(scale, factors, updates, is_leaf=is_none))


def _clip(most: float) -> optax.GradientTransformation:
    """Gradients times ``most`` over their global norm, where that is at least ``most``.

    One factor for all, as XLA fuses a product into each operation that reads it. The quotient per element of
    `optax.clip_by_global_norm` is made once on a CPU and kept: two more passes over memory for every parameter.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _adamw(
    config: OptimizerConfig, learning_rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    b1, b2 = config.betas
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=config.eps, weight_decay=weight_decay)


def _labels(config: OptimizerConfig, roles: Any, params: optax.Params) -> Any:
    """The group of every parameter: "muon", "decayed", "plain" or "none", as a tree of the same structure."""
    structure: Any = jax.tree.structure(params)
    given = roles
    with contextlib.suppress(ValueError):  # what differs in more than what is frozen is told below
        roles = jax.tree.map(lambda role, param: None if param is None else role, roles, params)
    if jax.tree.structure(roles) != structure:
        ours, theirs = ({name for name, _ in named(tree)} for tree in (given, params))
        raise ValueError(
            "roles and parameters differ in structure; "
            f"without a role: {sorted(theirs - ours)}; without a parameter: {sorted(ours - theirs)}"
        )
    for (name, role), param in zip(named(roles), jax.tree.leaves(params), strict=True):
        if role in _LINEAR and param.ndim < 2:
            raise ValueError(f"{name}: the role {role!r} needs (..., out, in), found shape {param.shape}")
    orthogonalized = {"matrix"} if config.router == "adamw" else {"matrix", "router"}

    def label(role: str, param: Any) -> str:
        if role in ("vector", "decay", "constant"):
            return "none" if role == "constant" else "plain"
        if config.name == "muon" and role in orthogonalized and min(param.shape[-2:]) > 1:
            return "muon"
        return "decayed"

    return jax.tree.map(label, roles, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Show `inner` gradients and parameters in float32, so that its state is float32 too.

    Adam's second moment in bfloat16 would stop moving: 1 − b2 is below its resolution.
    """
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)
