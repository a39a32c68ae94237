"""One table from dimension letters to mesh axes, for parameters and activations alike, and the mesh it speaks of.

The mesh has five axes. ``data`` replicates parameters, ``fsdp`` shards them along the model width, or a latent one
where they have no other, ``expert`` along the experts, ``tensor`` along heads, hidden widths and vocabulary. The batch
is split over those three first ones, and ``context``, whose size is 1 for now, would split its sequences.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.errors import UserError, listed
from jaxmoe.params import Param, Tree, named

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
MESH_AXIS_OF: Mapping[str, str] = {
    "V": "tensor",
    "D": "fsdp",
    "A": "fsdp",
    "C": "fsdp",
    "Q": "tensor",
    "U": "tensor",
    "W": "tensor",
    "P": "tensor",
    "X": "tensor",
    "E": "expert",
    "F": "tensor",
    "I": "tensor",
}
"""Of parameters."""

_YIELDING = "AC"
"""Letters whose axis is the model width's where a parameter has that too."""

_AXES_OF: Mapping[str, tuple[str, ...]] = {
    **{letter: (axis,) for letter, axis in MESH_AXIS_OF.items()},
    "B": BATCH_AXES,
    "R": BATCH_AXES,
    "T": ("context",),
    "N": ("tensor",),
    "M": ("tensor",),
}
"""Of whatever has letters."""


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices of the run, in the order that jax finds best for its links.

    Args:
        data, fsdp, expert, tensor: sizes of the axes.
        devices: others, such as those of `jax.experimental.topologies`, in the order that they have there.

    Raises:
        UserError: the product of the sizes is not the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": 1, "tensor": tensor}
    count = jax.device_count() if devices is None else len(devices)
    if math.prod(sizes.values()) != count:
        told = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "context")
        kind = jax.default_backend() if devices is None else devices[0].device_kind
        raise UserError(
            f"mesh: {told} needs {math.prod(sizes.values())} devices but this run has {count} ({kind}): make their "
            f"product {count}"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices is None:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), MESH_AXES, axis_types=types)


def partition_spec(declared: Param) -> PartitionSpec:
    """Mesh axes of a parameter, one letter at a time; vectors are small and stay whole.

    Raises:
        ValueError: two letters of one parameter would share a mesh axis.
    """
    if declared.role in ("vector", "decay", "constant"):
        return PartitionSpec()
    axes = _mesh_axes(declared.dims)
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"dimensions {declared.dims} put two letters on one mesh axis: {axes}")
    return PartitionSpec(*axes)


def _mesh_axes(dims: str) -> list[str | None]:
    return [None if letter in _YIELDING and "D" in dims else MESH_AXIS_OF.get(letter) for letter in dims]


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
            if axis is None or declared.stored is not None:
                continue
            parts, what = size, f"{letter}={size}"
            if letter in "QPU" and declared.num_heads is not None:
                parts, what = declared.num_heads, f"N={declared.num_heads} (query heads)"
            if parts % mesh.shape[axis]:
                problems.append(f"{name}: {what} is not divisible by {axis}={mesh.shape[axis]}")
    if problems:
        raise UserError(f"mesh does not fit the model: {listed(sorted(problems), 8, '; ')}")
    return jax.tree.map(lambda declared: NamedSharding(mesh, _fitting(declared, mesh)), tree)


def fitting_mesh(tree: Tree, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh whose axis "fsdp" has as many of the first devices as divide every dimension that it shards."""
    for count in range(len(devices), 1, -1):
        mesh = make_mesh(fsdp=count, devices=devices[:count])
        try:
            shardings(tree, mesh)
        except UserError:
            continue
        return mesh
    return make_mesh(devices=devices[:1])


def _fitting(declared: Param, mesh: Mesh) -> PartitionSpec:
    """`partition_spec`, but that blocks of a packed weight, which are few, stay together where an axis does not divide
    them."""
    spec = partition_spec(declared)
    return spec if declared.stored is None else _divided(spec, declared.shape, mesh)


def _divided(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    sizes = zip(tuple(spec), shape, strict=False)
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in sizes))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a batch (…, B, T), with `leading` unsharded axes before B."""
    return NamedSharding(mesh, spec_of("." * leading + "BT", mesh.axis_names))


def axis_size(axis: str) -> int:
    """Devices along an axis of the enclosing ``jax.set_mesh``; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[axis]


def current_mesh() -> Any | None:
    """The mesh of the enclosing ``jax.set_mesh``, or None outside of one or when it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def spec_of(letters: str, axes: Iterable[str] = MESH_AXES) -> PartitionSpec:
    """Mesh axes of an array by its dimension letters; the first of several letters that want an axis gets it.

    Args:
        letters: one per axis, such as "BTD"; one that the table does not have, such as ".", is not split.
        axes: those that the mesh has.
    """
    free = set(axes)
    parts: list[tuple[str, ...] | str | None] = []
    for letter in letters:
        own = tuple(axis for axis in _AXES_OF.get(letter, ()) if axis in free)
        free -= set(own)
        parts.append(own if len(own) > 1 else own[0] if own else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Ask for the sharding of an activation, or of a weight at hand, by its letters; does nothing without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(letters, mesh.axis_names))


def by_rows(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function` of arrays (B, …) whose rows have nothing to do with one another, on each device of its own rows.

    For what XLA would gather all rows for, such as a top-k. So it still does where devices do not divide the batch.

    Args:
        function: gives arrays (B, …).
        arrays: whole along every other axis; None stays None.
    """
    mesh = current_mesh()
    rows = jax.tree.leaves(arrays)[0].shape[0]
    if mesh is None or rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return function(*arrays)
    spec = spec_of("B", mesh.axis_names)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def constrain_fitting(x: jax.Array, letters: str) -> jax.Array:
    """`constrain` for an array of a packed weight, by one mesh axis for a letter, where that divides the dimension."""
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(*_mesh_axes(letters))
    return jax.lax.with_sharding_constraint(x, _divided(spec, x.shape, mesh))
