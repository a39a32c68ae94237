"""A run's computation, put together for devices at hand or for others that are only described."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.interop.adapting import Adapted, adapt
from jaxmoe.interop.decomposing import Decomposed
from jaxmoe.interop.selection import Selection, select
from jaxmoe.interop.source import Source, compute_dtype
from jaxmoe.kernels.devices import Device, describe
from jaxmoe.model.batch import Batch
from jaxmoe.model.spec import ModelSpec
from jaxmoe.optim import build_optimizer, schedule
from jaxmoe.parallel import processes
from jaxmoe.parallel.sharding import batch_sharding, shardings
from jaxmoe.params import Tree, roles, split
from jaxmoe.run.model import open_model
from jaxmoe.run.weights import InitialWeights
from jaxmoe.training.state import TrainState, abstract_state, checksum, init_state, stored_dtypes
from jaxmoe.training.step import StepSpec, TrainStep, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Assembled:
    """Everything of a run that is known before a weight is loaded or a document read.

    Attributes:
        config: the run.
        source: the model, its layers grouped by what of them is trained.
        declared: declarations of its parameters, low-rank pairs among them.
        mask: whether each parameter is trainable.
        adapted: what has a low-rank pair; None where weights are trained.
        mesh: the devices.
        device: what kind they are; decides about attention's implementation, the experts' backend and peak rates.
        optimizer: of the trainable parameters.
        learning_rate: of every step.
        step_spec: what a step computes.
    """

    config: RunConfig
    source: Source
    declared: Tree
    mask: Tree
    adapted: Adapted | None
    mesh: Mesh
    device: Device
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    step_spec: StepSpec

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.source.spec

    @property
    def dtype(self) -> Any:
        """That of the computation, and of the export of a model that has no source folder."""
        return self.step_spec.dtype

    @property
    def dtypes(self) -> Tree:
        """In which each parameter is held."""
        return stored_dtypes(self.declared, self.mask, self.dtype)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings."""
        return abstract_state(self.optimizer, self.declared, self.mask, self.dtype, self.mesh)

    @functools.cached_property
    def batch(self) -> Batch:
        """Shapes, dtypes and sharding of what a step takes: (micro-batches, B, T)."""
        train = self.config.train
        shape = (train.accumulation, train.rows, self.config.data.sequence_length)
        whole, real = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, leading=1))
            for dtype in (jnp.int32, jnp.float32)
        )
        return Batch(tokens=whole, positions=whole, segment_ids=whole, targets=whole, weights=real)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """See `jaxmoe.training.step.make_train_step`."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        with jax.set_mesh(self.mesh):
            return make_train_step(self.step_spec, self.optimizer, self.learning_rate, where)

    @functools.cached_property
    def eval_step(self) -> Any:
        """See `jaxmoe.training.step.make_eval_step`."""
        with jax.set_mesh(self.mesh):
            return make_eval_step(self.step_spec)

    @functools.cached_property
    def initial_weights(self) -> InitialWeights:
        """Those that the run begins with."""
        return self._weights(self.dtypes)

    @functools.cached_property
    def decomposed(self) -> Decomposed | None:
        """The adapted weights, where their pairs begin as a part of them."""
        if self.adapted is None or not self.adapted.decomposes:
            return None
        return Decomposed(self.source, self.adapted, self.config.train.seed)

    def _weights(self, wanted: Tree) -> InitialWeights:
        seed = self.config.train.seed
        return InitialWeights(self.source, wanted, self.mesh, seed, self.adapted, self.decomposed)

    def begin(self, weights: Tree) -> TrainState:
        """The state before the first step. In several processes all must call it."""
        self._check_factors()
        return init_state(weights, self.optimizer, self.mask, self.config.train.seed, self.mesh)

    def frozen_weights(self) -> Tree:
        """What no checkpoint holds, as it was at the start; nothing else is read. See `check_frozen`."""
        wanted = split(self.dtypes, self.mask)[1]
        if not jax.tree.leaves(wanted):
            return self.state.frozen
        return self._weights(wanted).make()

    def check_adapter(self, expected: int | None) -> None:
        """Compare what is adapted, which ``adapter.path`` may say, with what it was when a checkpoint was written.

        Args:
            expected: `Adapted.fingerprint` in the checkpoint.

        Raises:
            UserError: they differ.
        """
        if self.adapted is not None and self.adapted.fingerprint != expected:
            raise UserError(
                f"adapter.path: {self.adapted.given_from} has other ranks, scales or targets than when the run began: "
                "put back the adapter that it began with, or begin another run"
            )

    def check_frozen(self, frozen: Tree, expected: int | None) -> None:
        """Compare frozen weights with what they were at the start. In several processes all must call it.

        Args:
            frozen: from `frozen_weights`.
            expected: the `checksum` that a checkpoint holds.

        Raises:
            UserError: they differ.
        """
        self._check_factors()
        found = checksum(frozen)
        if found != expected:
            origin = self.source.folder or "model.config"
            raise UserError(
                f"{origin}: the frozen weights have the checksum {found} here and had {expected} when the run began, "
                "which kept them nowhere else: put back what it began with (of random ones jax's version and kind of "
                "device, of those without a part that adapter.init took the kind of processor), or begin another run"
            )

    def _check_factors(self) -> None:
        """Every process takes the weights apart for itself."""
        if self.decomposed is None or jax.process_count() == 1:
            return
        if len(set(processes.gather(self.decomposed.checksum))) > 1:
            raise UserError(
                f"adapter.init {self.config.adapter and self.config.adapter.init!r}: processes took the weights apart "
                "differently, expected processors of one kind: use these, or adapter.init 'default'"
            )

    def lower(self) -> Any:
        """The training step traced for the devices.

        What ``.compile()`` gives, which needs their compiler and not them, is the `function` of a `TrainStep`.
        """
        with jax.set_mesh(self.mesh):
            return self.train_step.lower(self.state, self.batch)


def assemble(
    config: RunConfig, mesh: Mesh, device: Device | None = None, source: Source | None = None
) -> Assembled:
    """Put a run together.

    Args:
        config: the run; its ``mesh`` section is not looked at.
        mesh: devices at hand, or those of `jax.experimental.topologies`.
        device: what kind of device computes, by default what those of the mesh are.
        source: the model, by default the one that the config names.

    Raises:
        UserError: the model or its folder is malformed, patterns of trainable parameters match nothing, or the mesh
            does not divide the model or the batch.
    """
    source = open_model(config.model) if source is None else source
    source = dataclasses.replace(source, mtp=config.train.export_mtp)
    chosen: Adapted | Selection
    choosing = config.train.indexer_loss > 0
    if config.adapter is not None:
        chosen = adapt(source, config.adapter, config.model.packing)
        declared, rates = chosen.declared, chosen.rates(config.adapter.learning_rate_ratio)
    else:
        chosen = select(source, config.trainable, config.frozen, choosing)
        declared, rates = chosen.source.spec.declared, None
    trained = zip(jax.tree.leaves(declared), jax.tree.leaves(chosen.mask), strict=True)
    if choosing and not any(parameter.chooses and is_trained for parameter, is_trained in trained):
        raise UserError(
            f"train.indexer_loss = {config.train.indexer_loss:g} reaches nothing that is trained: expected 0, or a "
            "model with indexers of which something is trained"
        )
    shardings(chosen.source.spec.declared, mesh)
    shardings(declared, mesh)
    device = describe(mesh.devices.flat[0]) if device is None else device
    return Assembled(
        config=config,
        source=chosen.source,
        declared=declared,
        mask=chosen.mask,
        adapted=chosen if isinstance(chosen, Adapted) else None,
        mesh=mesh,
        device=device,
        optimizer=build_optimizer(config.optimizer, roles(declared, choosing), config.train.steps, rates),
        learning_rate=schedule(config.optimizer, config.train.steps),
        step_spec=StepSpec(
            model=chosen.source.spec,
            dtype=compute_dtype(config.model.dtype),
            remat=config.model.remat,
            aux_loss=config.balance.aux_loss,
            z_loss=config.balance.z_loss,
            packed=config.data.packing,
            device=device,
            dropout=chosen.dropout if isinstance(chosen, Adapted) else 0.0,
            indexer_loss=config.train.indexer_loss,
        ),
    )
