"""One optimiser step and one evaluation step, as pure functions of a state and a batch."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import params
from jaxmoe.model import decoder
from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.precision import float32_matmuls
from jaxmoe.model.spec import ModelSpec, model_params
from jaxmoe.parallel import sharding
from jaxmoe.params import Tree
from jaxmoe.training import losses


class TrainState(NamedTuple):
    """All that a run needs to go on, as arrays or (`abstract_state`) as their shapes.

    Attributes:
        params: float32 master weights.
        opt_state: of the optimiser.
        step: () int32, optimiser steps done.
        key: data of the PRNG key that the next step splits, uint32.
    """

    params: Tree
    opt_state: Any
    step: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What one step computes.

    Attributes:
        model: the model.
        dtype: compute dtype.
        remat: recompute layers in the backward pass.
        aux_loss: weight of `jaxmoe.training.losses.load_balancing_loss`.
        z_loss: weight of `jaxmoe.training.losses.router_z_loss`.
        packed: training rows may hold several documents; False spares attention its mask (see
            `jaxmoe.model.decoder.hidden_states`). Evaluation always takes packed rows.
    """

    model: ModelSpec
    dtype: Any
    remat: bool
    aux_loss: float
    z_loss: float
    packed: bool = True


def init_state(
    weights: Tree, optimizer: optax.GradientTransformation, spec: ModelSpec, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, the optimiser's moments sharded like the weights that they belong to."""
    opt_state = jax.jit(optimizer.init, out_shardings=opt_state_shardings(optimizer, spec, mesh))(weights)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.device_put(jnp.zeros((), jnp.int32), whole)
    # Raw key data rather than a key array: checkpoints hold plain integers.
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), whole)
    return TrainState(weights, opt_state, step, key)


def abstract_state(optimizer: optax.GradientTransformation, spec: ModelSpec, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring a checkpoint or planning a run."""
    tree = model_params(spec)
    weights = params.abstract(tree, jnp.float32)

    def place(array: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, weights)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        params=jax.tree.map(place, weights, sharding.shardings(tree, mesh)),
        opt_state=jax.tree.map(place, opt_state, opt_state_shardings(optimizer, spec, mesh)),
        step=place(jax.ShapeDtypeStruct((), jnp.int32), whole),
        key=place(key, whole),
    )


def opt_state_shardings(optimizer: optax.GradientTransformation, spec: ModelSpec, mesh: Mesh) -> Any:
    """Shardings of the optimiser's state: moments follow their parameter, counters are whole everywhere.

    A moment is known by its path in the state, which ends in the path of its parameter, and by its shape.
    """
    tree = model_params(spec)
    weights = params.abstract(tree, jnp.float32)
    of_path = {
        path: (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree_util.tree_flatten_with_path(weights)[0],
            jax.tree.leaves(sharding.shardings(tree, mesh)),
            strict=True,
        )
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path)):
            shape, where = of_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return where
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, weights))


def make_train_step(
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    state_shardings: Any,
) -> Any:
    """A jitted function (state, batch) → (state, metrics) that takes over the state's buffers.

    The batch is a dict of tokens, segment_ids and positions, each (micro-batches, B, T) int32. The
    language-model loss is a mean over all targets of all micro-batches, so how they are split changes nothing
    but rounding. Within a micro-batch the gradients of layers and of the last norm are in the compute dtype,
    also where they are summed over devices: XLA reduces them before it casts them. Those of the embedding and
    of the output head are summed over devices in float32, and all of them over micro-batches.

    Metrics: ``loss`` (nats per target, without balance terms), ``aux_loss``, ``z_loss``, ``grad_norm``
    (before clipping), ``learning_rate``, ``targets``, ``tokens`` (valid ones), and ``router`` with a leading
    axis over MoE layers (`jaxmoe.model.feed_forward.router.RouterStats`, summed over the batch).
    """

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
        grads, metrics = _accumulate(spec, state.params, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate(state.step)
        weights = optax.apply_updates(state.params, updates)
        return TrainState(weights, opt_state, state.step + 1, jax.random.key_data(key)), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def make_eval_step(spec: StepSpec) -> Any:
    """A jitted function (params, batch) → summed loss in nats over the batch's targets, (B, T) arrays."""

    def step(weights: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        inputs = decoder.Batch(batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden, _ = decoder.hidden_states(weights, spec.model, inputs, dtype=spec.dtype)
        return losses.linear_cross_entropy(hidden, decoder.output_head(weights, spec.model), batch["targets"])

    return jax.jit(step)


def _accumulate(
    spec: StepSpec, weights: Tree, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[Tree, dict[str, Any]]:
    """Gradients and metrics of all micro-batches."""
    count = batch["tokens"].shape[0]
    segments = batch["segment_ids"]
    targets = jnp.sum((segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)).astype(jnp.float32)

    def loss_of(
        weights: Tree, micro: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        return _loss(spec, weights, micro, key, 1.0 / jnp.maximum(targets, 1.0), 1.0 / count)

    def one(micro: dict[str, jax.Array], index: jax.Array | int) -> tuple[Tree, dict[str, Any]]:
        # Once more around the backward pass: custom gradients are traced in it.
        with float32_matmuls(spec.dtype):
            return jax.grad(loss_of, has_aux=True)(weights, micro, jax.random.fold_in(key, index))

    if count == 1:
        grads, metrics = one(jax.tree.map(lambda x: x[0], batch), 0)
    else:
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch), 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(total: Any, scanned: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(*scanned)), None

        (grads, metrics), _ = jax.lax.scan(body, zeros, (batch, jnp.arange(count)))
    return grads, metrics | {"targets": targets, "tokens": jnp.sum(segments > 0).astype(jnp.float32)}


def _loss(
    spec: StepSpec,
    weights: Tree,
    micro: dict[str, jax.Array],
    key: jax.Array,
    per_target: jax.Array,
    share: float,
) -> tuple[jax.Array, dict[str, Any]]:
    """This micro-batch's part of the loss: terms of all micro-batches add up to the batch's."""
    inputs = decoder.Batch(micro["tokens"], micro["positions"], micro["segment_ids"])
    hidden, stats = decoder.hidden_states(
        weights, spec.model, inputs, dtype=spec.dtype, remat=spec.remat, packed=spec.packed, key=key
    )
    head = decoder.output_head(weights, spec.model)
    targets = losses.next_token_targets(inputs.tokens, inputs.segment_ids)
    language = losses.linear_cross_entropy(hidden, head, targets) * per_target
    metrics: dict[str, Any] = {"loss": language}
    total = language
    if stats is not None:
        metrics["aux_loss"] = losses.load_balancing_loss(stats) * share
        metrics["z_loss"] = losses.router_z_loss(stats) * share
        metrics["router"] = stats
        total = total + spec.aux_loss * metrics["aux_loss"] + spec.z_loss * metrics["z_loss"]
    return total, metrics


def router_metrics(stats: RouterStats) -> dict[str, list[float]]:
    """Per-layer figures for the log, from statistics with a leading axis over MoE layers.

    ``router/max_violation`` is the largest load over the mean, minus 1 (MaxVio, arXiv 2408.15664);
    ``router/entropy`` the entropy of the load over that of a uniform one; ``router/dead`` the share of experts
    that no token chose.
    """
    import numpy as np

    load = np.asarray(stats.load, np.float64)
    share = load / np.maximum(load.sum(-1, keepdims=True), 1.0)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(-1) / max(np.log(load.shape[-1]), 1e-30)
    return {
        "router/max_violation": (share.max(-1) * load.shape[-1] - 1).tolist(),
        "router/entropy": entropy.tolist(),
        "router/dead": (load == 0).mean(-1).tolist(),
    }
