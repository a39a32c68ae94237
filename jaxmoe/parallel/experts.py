"""The experts of a layer on a mesh: where the weights of experts meet activations, whatever they are made of."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.kernels.devices import Device
from jaxmoe.kernels.expert_mlp import Activation, Experts, Lora, SlotDropout, expert_mlp
from jaxmoe.kernels.expert_mlp.operands import is_packed, shape_of
from jaxmoe.model.linear import LowRank, dense
from jaxmoe.parallel.sharding import BATCH_AXES, axis_size, current_mesh, spec_of
from jaxmoe.params import Repeat, Tree

_LETTERS = {"gate_up": "EGF.", "down": "E.F", "gate_up_bias": "EGF", "down_bias": "E."}
"""Of each parameter; the model width is gathered before experts multiply."""


def experts_on_mesh(
    params: Tree | Repeat,
    activation: Activation,
    x_RD: Float[Array, "R D"],
    experts_RK: Int[Array, "R K"],
    weights_RK: Float[Array, "R K"],
    device: Device | None = None,
) -> Float[Array, "R D"]:
    """`jaxmoe.kernels.expert_mlp` where the mesh shards it.

    Tokens are gathered along the expert axis, each device computes its own experts and its own slice of the
    hidden width, and the partial sums are scattered back: two collectives per layer. Everything between is
    local, so each device sorts and multiplies only what it holds.

    Args:
        params: gate_up (E, G, F, D) and down (E, D, F), each any weight of `jaxmoe.model.linear`, and biases. A
            low-rank pair runs in the same kernels as its base; in that of gate_up, gate and up share a (E, 1, r, D).
            Without a mesh they may be a `Repeat` of arrays and what is packed.
        activation: of the experts.
        x_RD: (R, D).
        experts_RK: (R, K) int32, those that each token goes to.
        weights_RK: (R, K).
        device: that computes; None for the one at hand.

    Returns:
        (R, D).

    Raises:
        ValueError: gate and up have an a each.
    """
    if isinstance(params, Repeat):  # the experts of all layers, of which no token chooses those of others
        joined = params.joined
        experts_RK = experts_RK + params.index * (shape_of(joined["down"])[0] // params.repeats)
        params = joined
    experts, dropout = _operands(params, x_RD.dtype), _dropout(params)
    layer = functools.partial(expert_mlp, activation=activation, device=device)
    mesh = current_mesh()
    if mesh is None:
        return layer(x_RD, experts, experts_RK, weights_RK, dropout=dropout)
    local = functools.partial(_of_one_device, layer, shape_of(experts.down)[0])
    # shard_map wants equal parts; a single prompt may have any number of rows. Those added weigh nothing.
    missing = -x_RD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padded = (jnp.pad(x, ((0, missing), (0, 0))) for x in (x_RD, experts_RK, weights_RK))
    rows = spec_of("R", mesh.axis_names)
    out_RD = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_specs(experts, mesh.axis_names), PartitionSpec(), rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(experts, dropout, *padded)
    return out_RD[: x_RD.shape[0]]


def _of_one_device(
    layer: Any,
    num_experts: int,
    experts: Experts,
    dropout: SlotDropout | None,
    x_RD: jax.Array,
    experts_RK: jax.Array,
    weights_RK: jax.Array,
) -> jax.Array:
    """What a device's own experts and slice of the hidden width add to all rows, summed and scattered back."""
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    if experts.down_bias is not None:  # the partial sums over slices of the hidden width add it up once
        first = jax.lax.axis_index("tensor") == 0
        experts = experts._replace(down_bias=jnp.where(first, experts.down_bias, 0))
    partial_RD = layer(
        gather(x_RD),
        experts,
        gather(experts_RK),
        gather(weights_RK),
        num_experts=num_experts,
        first=jax.lax.axis_index("expert") * shape_of(experts.down)[0],
        dropout=None if dropout is None else _own_dropout(dropout),
    )
    wide_RD = jax.lax.psum(partial_RD.astype(jnp.float32), "tensor")
    return jax.lax.psum_scatter(wide_RD, "expert", tiled=True).astype(x_RD.dtype)


def _operands(params: Tree, dtype: Any) -> Experts:
    """What the kernels take: low-rank pairs beside their bases, their factors within B; everything else an array."""
    arrays: dict[str, Any] = {
        name: value for name, value in params.items() if name not in ("gate_up", "down")
    }
    pairs: dict[str, Any] = {}
    for name in ("gate_up", "down"):
        weight = params[name]
        if isinstance(weight, LowRank):
            a = weight.a
            if name == "gate_up":
                if a.shape[1] != 1:
                    raise ValueError(
                        f"a of gate_up is {a.shape}; expected (experts, 1, rank, width), which gate and up share"
                    )
                a = a[:, 0]
            pairs |= {f"{name}_a": a, f"{name}_b": weight.b * jnp.asarray(weight.scale, weight.b.dtype)}
            weight = weight.base
        # Slices of the hidden width would cut blocks of what is packed.
        whole = is_packed(weight) and axis_size("tensor") == 1
        arrays[name] = weight if whole else dense(weight, dtype)
    return Experts(**arrays, lora=Lora(**pairs))


def _dropout(params: Tree) -> SlotDropout | None:
    """Of the low-rank pairs, if these have any."""
    found = {name: params[name].dropout for name in ("gate_up", "down") if isinstance(params[name], LowRank)}
    drawn = [one for one in found.values() if one is not None]
    if not drawn:
        return None
    # The kernels draw nothing for a pair that is not there.
    up, down = (jax.random.key_data(found.get(name, drawn[0]).key) for name in ("gate_up", "down"))
    return SlotDropout(up, down, drawn[0].rate)


def _own_dropout(dropout: SlotDropout) -> SlotDropout:
    """For the rows of this device, which are numbered from 0 on each; and for its slice of the hidden width."""

    def fold(data: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        key = jax.random.wrap_key_data(data)
        for axis in axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return jax.random.key_data(key)

    rows = tuple(axis for axis in BATCH_AXES if axis != "expert")
    return SlotDropout(fold(dropout.up, rows), fold(dropout.down, (*rows, "tensor")), dropout.rate)


def _specs(experts: Experts, axes: tuple[str, ...]) -> Experts:
    """Mesh axes of every operand that is there."""
    pairs = {"gate_up_a": "E..", "gate_up_b": "EGF.", "down_a": "E.F", "down_b": "E.."}

    def chosen(arrays: dict[str, Any], letters: dict[str, str]) -> dict[str, Any]:
        return {name: spec_of(letters[name], axes) for name, array in arrays.items() if array is not None}

    lora = Lora(**chosen(experts.lora._asdict(), pairs))
    own = {name: value for name, value in experts._asdict().items() if name != "lora"}
    specs = chosen(own, _LETTERS)
    for name in ("gate_up", "down"):
        if is_packed(own[name]):  # gathered along the model width as bytes
            specs[name] = jax.tree.map(lambda array: spec_of("E" + "." * (array.ndim - 1), axes), own[name])
    return Experts(**specs, lora=lora)
