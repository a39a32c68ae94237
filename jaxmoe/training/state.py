"""The state of a run: what is trained, what is not, and what the optimiser keeps."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import params
from jaxmoe.parallel.sharding import shardings
from jaxmoe.params import Param, Tree


class Saved(NamedTuple):
    """The part of a state that a checkpoint holds. What is frozen is read, or drawn, again as it was at the start."""

    params: Tree
    opt_state: Any
    step: Any
    key: Any


class TrainState(NamedTuple):
    """All that a run needs to go on, as arrays or (`abstract_state`) as their shapes.

    `trainable` and `frozen` have the structure of the model's declarations, each with None for the leaves of the other.

    Attributes:
        trainable: float32 master weights.
        frozen: the other weights, in the dtype that the model computes in.
        opt_state: of the optimiser, for what is trainable.
        step: () int32, optimiser steps done.
        key: data of the PRNG key that the next step splits, uint32.
    """

    trainable: Tree
    frozen: Tree
    opt_state: Any
    step: Any
    key: Any

    @property
    def params(self) -> Tree:
        """The whole model."""
        return params.joined(self.trainable, self.frozen)

    @property
    def saved(self) -> Saved:
        """What a checkpoint holds."""
        return Saved(self.trainable, self.opt_state, self.step, self.key)

    def restored(self, saved: Saved) -> "TrainState":
        """This state with what a checkpoint held."""
        return TrainState(saved.params, self.frozen, saved.opt_state, saved.step, saved.key)


def checksum(tree: Tree) -> int | None:
    """Of the bits of all arrays, however they are sharded; None without any. In several processes all must call it."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return None
    sums = [int(total) for total in _sums_of_bits(leaves)]
    return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


def not_finite(state: TrainState) -> list[str]:
    """Names of the arrays that hold nan or infinity, of weights as the model calls them, the optimiser's as opt_state.…

    In several processes all must call it, and find the same.
    """
    bad = [name for name, finite in params.named(_are_finite(state)) if not finite]
    return [name.removeprefix("trainable.").removeprefix("frozen.") for name in bad]


@jax.jit
def _are_finite(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), state)


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    """Modulo 2³²: integers, whose order does not matter."""
    unsigned = (jax.lax.bitcast_convert_type(x, jnp.dtype(f"u{x.dtype.itemsize}")) for x in leaves)
    return [jnp.sum(x, dtype=jnp.uint32) for x in unsigned]


def stored_dtypes(declared: Tree, mask: Tree, dtype: Any) -> Tree:
    """The dtype in which a run holds each parameter: float32 if it is trained, else that of the computation.

    Args:
        declared: the model's declarations.
        mask: whether each is trainable.
        dtype: compute dtype.
    """
    return jax.tree.map(
        lambda parameter, trained: jnp.dtype("float32") if trained else parameter.dtype(dtype), declared, mask
    )


def init_state(
    weights: Tree, optimizer: optax.GradientTransformation, mask: Tree, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, the optimiser's moments sharded like the weights that they belong to.

    Args:
        weights: all of the model's, on the mesh, in the dtypes of `stored_dtypes`.
        optimizer: of the trainable ones.
        mask: whether each is trainable.
        seed: of the run.
        mesh: of the weights.
    """
    trainable, frozen = params.split(weights, mask)
    whole = NamedSharding(mesh, PartitionSpec())
    where = _opt_state_shardings(optimizer, trainable, whole)
    opt_state = jax.jit(optimizer.init, out_shardings=where)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), whole)
    # Raw key data rather than a key array: checkpoints hold plain integers.
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), whole)
    return TrainState(trainable, frozen, opt_state, step, key)


def abstract_state(
    optimizer: optax.GradientTransformation, declared: Tree, mask: Tree, dtype: Any, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring a checkpoint or planning a run.

    Args:
        optimizer: of the trainable weights.
        declared: the model's declarations.
        mask: whether each is trainable.
        dtype: compute dtype.
        mesh: that shards the state.
    """

    def place(parameter: Param, dtype: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(parameter.shape, dtype, sharding=where)

    weights = jax.tree.map(place, declared, stored_dtypes(declared, mask, dtype), shardings(declared, mesh))
    trainable, frozen = params.split(weights, mask)
    whole = NamedSharding(mesh, PartitionSpec())

    def like(array: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    opt_state = jax.eval_shape(optimizer.init, trainable)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        trainable,
        frozen,
        jax.tree.map(like, opt_state, _opt_state_shardings(optimizer, trainable, whole)),
        step=like(jax.ShapeDtypeStruct((), jnp.int32), whole),
        key=like(key, whole),
    )


def _opt_state_shardings(
    optimizer: optax.GradientTransformation, trainable: Tree, whole: NamedSharding
) -> Any:
    """Shardings of the optimiser's state: moments follow their parameter, counters are `whole` everywhere.

    A moment is known by its path in the state, which ends in the path of its parameter, and by its shape. (Not by
    optax.tree.map_params: that asks for a state of placeholders without shapes, and ours treats parameters by shape.)
    """
    of_path = {
        path: (leaf.shape, leaf.sharding) for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path)):
            shape, where = of_path.get(path[start:], (None, None))
            if where is not None and shape == leaf.shape:
                return where
        return whole

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trainable))
