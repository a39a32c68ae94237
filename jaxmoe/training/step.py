"""One optimiser step and one evaluation step, as pure functions of a state and a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.kernels.devices import Device, device_at_hand
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.model.spec import ModelSpec
from jaxmoe.parallel.sharding import current_mesh
from jaxmoe.params import Tree, joined
from jaxmoe.training.balance import load_balancing_loss, router_z_loss
from jaxmoe.training.indexers import indexer_loss
from jaxmoe.training.objectives import Objective
from jaxmoe.training.objectives.language_model import LanguageModel
from jaxmoe.training.state import Saved, TrainState


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What one step computes.

    Attributes:
        model: the model.
        dtype: compute dtype.
        remat: recompute layers in the backward pass.
        aux_loss: weight of `jaxmoe.training.balance.load_balancing_loss`.
        z_loss: weight of `jaxmoe.training.balance.router_z_loss`.
        indexer_loss: weight of `jaxmoe.training.indexers.indexer_loss`; 0 does not even compute it.
        packed: training rows may hold several documents; False spares attention its mask (see
            `jaxmoe.model.decoder.hidden_states`). Evaluation always takes packed rows.
        objective: what is minimised beside those.
        device: that computes; None for the one at hand.
        dropout: share that low-rank pairs of layers drop of their inputs in training.
    """

    model: ModelSpec
    dtype: Any
    remat: bool
    aux_loss: float
    z_loss: float
    packed: bool = True
    objective: Objective = LanguageModel()
    device: Device | None = None
    dropout: float = 0.0
    indexer_loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """(state, batch) → (state, metrics), which takes over the buffers of what it changes of the state.

    What is frozen is no part of what is given back: where a buffer is not jax's own, as weights that were read are on
    a CPU, it would be copied.

    Attributes:
        function: (saved, frozen, batch) → (saved, metrics), jitted or compiled.
    """

    function: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Take the step."""
        saved, metrics = self.function(state.saved, state.frozen, batch)
        return state.restored(saved), metrics

    def trace(self, state: TrainState, batch: Batch) -> Any:
        """`jax.stages.Traced`, of a jitted function."""
        return self.function.trace(state.saved, state.frozen, batch)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """`jax.stages.Lowered`, of a jitted function; what it compiles to is a `function` again."""
        return self.function.lower(state.saved, state.frozen, batch)


def make_train_step(
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    state_shardings: TrainState | None,
) -> TrainStep:
    """A training step, jitted.

    The batch is a `Batch` of (micro-batches, B, T). The loss is a mean over all targets of all micro-batches, so
    how they are split changes nothing but rounding. Gradients are of the trainable weights alone. Within a
    micro-batch those of layers and of the last norm are in the compute dtype, also where they are summed over
    devices: XLA reduces them before it casts them. Those of the embedding and of the output head are summed over
    devices in float32, and all of them over micro-batches.

    Metrics: ``loss`` (nats per target, without the other terms), ``aux_loss``, ``z_loss``, ``indexer_loss`` where it
    has a weight, ``grad_norm`` (before clipping), ``learning_rate``, ``targets`` (those that count), ``tokens`` (valid
    ones), and ``router`` with a leading axis over MoE layers (`jaxmoe.model.feed_forward.router.RouterStats`, summed
    over the batch).
    """

    def step(saved: Saved, frozen: Tree, batch: Batch) -> tuple[Saved, dict[str, Any]]:
        key, step_key = jax.random.split(jax.random.wrap_key_data(saved.key))
        grads, metrics = _accumulate(spec, saved.params, frozen, batch, step_key)
        updates, opt_state = optimizer.update(grads, saved.opt_state, saved.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate(saved.step)
        weights = optax.apply_updates(saved.params, updates)
        return Saved(weights, opt_state, saved.step + 1, jax.random.key_data(key)), metrics

    where = (None if state_shardings is None else state_shardings.saved, None)
    options = _compiler_options(spec.device)
    return TrainStep(jax.jit(step, donate_argnums=0, out_shardings=where, compiler_options=options))


def make_eval_step(spec: StepSpec) -> Any:
    """A jitted function (weights, batch) → summed loss over the batch's targets, of a `Batch` of (B, T) arrays."""

    def step(weights: Tree, batch: Batch) -> jax.Array:
        hidden, _ = decoder.hidden_states(weights, spec.model, batch, dtype=spec.dtype, device=spec.device)
        return spec.objective.loss(hidden, decoder.output_head(weights, spec.model), batch)[0]

    return jax.jit(step, compiler_options=_compiler_options(spec.device))


def _compiler_options(device: Device | None) -> dict[str, Any]:
    """XLA's options for a step on the mesh at hand.

    Its scheduler for CPUs otherwise lets collectives that do not depend on each other begin in any order, another
    on every device: those of a mesh then wait for each other for good.
    """
    platform = (device_at_hand() if device is None else device).platform
    if platform != "cpu" or current_mesh() is None:
        return {}
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def _accumulate(
    spec: StepSpec, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array
) -> tuple[Tree, dict[str, Any]]:
    """Gradients and metrics of all micro-batches."""
    count = batch.tokens.shape[0]
    size = spec.objective.size(batch)
    per_target = 1.0 / jnp.where(size > 0, size, 1.0)

    def loss_of(trainable: Tree, micro: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        weights = joined(trainable, frozen)
        return _loss(spec, weights, micro, key, per_target, 1.0 / count)

    def one(micro: Batch, index: jax.Array | int) -> tuple[Tree, dict[str, Any]]:
        # Once more around the backward pass: custom gradients are traced in it.
        with float32_matmuls(spec.dtype):
            return jax.grad(loss_of, has_aux=True)(trainable, micro, jax.random.fold_in(key, index))

    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        grads, metrics = one(first, 0)
    else:
        shapes = jax.eval_shape(one, first, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(total: Any, scanned: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(*scanned)), None

        (grads, metrics), _ = jax.lax.scan(body, zeros, (batch, jnp.arange(count)))
    counted = jnp.sum(batch.weights > 0).astype(jnp.float32)
    return grads, metrics | {"targets": counted, "tokens": jnp.sum(batch.segment_ids > 0).astype(jnp.float32)}


def _loss(
    spec: StepSpec, weights: Tree, micro: Batch, key: jax.Array, per_target: jax.Array, share: float
) -> tuple[jax.Array, dict[str, Any]]:
    """This micro-batch's part of the loss: terms of all micro-batches add up to the batch's."""
    found = decoder.outputs(
        weights,
        spec.model,
        micro,
        dtype=spec.dtype,
        remat=spec.remat,
        packed=spec.packed,
        key=key,
        device=spec.device,
        dropout=spec.dropout,
        indexers=spec.indexer_loss > 0,
    )
    summed, sums = spec.objective.loss(found.hidden_BTD, decoder.output_head(weights, spec.model), micro)
    total = summed * per_target
    metrics: dict[str, Any] = {"loss": total} | {name: value * per_target for name, value in sums.items()}
    if found.indexer is not None:
        metrics["indexer_loss"] = indexer_loss(found.indexer) * share
        total = total + spec.indexer_loss * metrics["indexer_loss"]
    if found.router is not None:
        metrics["aux_loss"] = load_balancing_loss(found.router) * share
        metrics["z_loss"] = router_z_loss(found.router) * share
        metrics["router"] = found.router
        total = total + spec.aux_loss * metrics["aux_loss"] + spec.z_loss * metrics["z_loss"]
    return total, metrics
