"""One table from dimension letters to mesh axes, and the mesh it speaks of.

The mesh has four axes. ``data`` replicates parameters, ``fsdp`` shards them along the model width,
``expert`` along the experts, ``tensor`` along heads, hidden widths and vocabulary. The batch is split over
the first three.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.errors import UserError
from jaxmoe.params import Param, Tree, named

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
MESH_AXIS_OF = {
    "V": "tensor",
    "D": "fsdp",
    "Q": "tensor",
    "U": "tensor",
    "W": "tensor",
    "P": "tensor",
    "E": "expert",
    "F": "tensor",
    "I": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of the run, in the order that jax finds best for its links.

    Raises:
        UserError: the product of the sizes is not the number of devices.
    """
    shape = (data, fsdp, expert, tensor)
    if math.prod(shape) != jax.device_count():
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise UserError(
            f"mesh: {sizes} needs {math.prod(shape)} devices but this run has {jax.device_count()} "
            f"({jax.default_backend()}): make their product {jax.device_count()}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(declared: Param, axis_of: dict[str, str] | None = None) -> PartitionSpec:
    """Mesh axes of a parameter, one letter at a time; vectors are small and stay whole.

    Args:
        declared: the parameter.
        axis_of: the table from letter to mesh axis; by default `MESH_AXIS_OF`.

    Raises:
        ValueError: two letters of one parameter would share a mesh axis.
    """
    if declared.role in ("vector", "constant"):
        return PartitionSpec()
    axes = [(MESH_AXIS_OF if axis_of is None else axis_of).get(letter) for letter in declared.dims]
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"dimensions {declared.dims} put two letters on one mesh axis: {axes}")
    return PartitionSpec(*axes)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """A `NamedSharding` for every declared parameter.

    Raises:
        UserError: a mesh axis does not divide the dimension, or the query heads, that it shards (all such are
            listed).
    """
    problems = []
    for name, declared in named(tree):
        for size, letter, axis in zip(
            declared.shape, declared.dims, tuple(partition_spec(declared)), strict=False
        ):
            if axis is None:
                continue
            parts, what = size, f"{letter}={size}"
            if letter in "QP" and declared.num_heads is not None:
                parts, what = declared.num_heads, f"N={declared.num_heads} (query heads)"
            if parts % mesh.shape[axis]:
                problems.append(f"{name}: {what} is not divisible by {axis}={mesh.shape[axis]}")
    if problems:
        listed = "; ".join(sorted(problems)[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise UserError(f"mesh does not fit the model: {listed}")
    return jax.tree.map(lambda declared: NamedSharding(mesh, partition_spec(declared)), tree)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a batch (…, B, T): rows over `BATCH_AXES`, with `leading` unsharded axes before B."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


def axis_size(axis: str) -> int:
    """Devices along an axis of the enclosing ``jax.set_mesh``; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[axis]


def current_mesh() -> Any | None:
    """The mesh of the enclosing ``jax.set_mesh``, or None outside of one or when it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Ask for a sharding of an activation, axis by axis; does nothing without a mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
