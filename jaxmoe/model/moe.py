"""The mixture-of-experts feed-forward: route, dispatch, experts, combine."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.expert_mlp import Experts, expert_mlp
from jaxmoe.model.router import RouterSpec, RouterStats, jitter, route, router_params, router_stats
from jaxmoe.params import Tree, param
from jaxmoe.sharding import BATCH_AXES, current_mesh


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """E gated experts of hidden width F behind a router; every expert is down(silu(gate(x)) · up(x))."""

    router: RouterSpec
    hidden: int


def moe_params(spec: MoESpec, width: int) -> Tree:
    """Declarations of router and experts for a model of `width`."""
    sizes = {"D": width, "E": spec.router.num_experts, "F": spec.hidden, "G": 2}
    return {
        "router": router_params(spec.router, width),
        "experts": {"gate_up": param("EGFD", sizes), "down": param("EDF", sizes)},
    }


def moe(
    params: Tree, spec: MoESpec, x_BTD: jax.Array, valid_BT: jax.Array | None, key: jax.Array | None
) -> tuple[jax.Array, RouterStats]:
    """x (B, T, D) → (B, T, D) and the layer's router statistics.

    Args:
        params: as declared by `moe_params`.
        spec: the layer.
        x_BTD: activations.
        valid_BT: (B, T) bool, false for padding; padding is computed but counted nowhere.
        key: PRNG key for router jitter, given in training only.
    """
    if key is not None and spec.router.jitter:
        x_BTD = jitter(x_BTD, spec.router.jitter, key)
    batch, length, width = x_BTD.shape
    x_RD = x_BTD.reshape(-1, width)
    routing = route(params["router"], spec.router, x_RD)
    stats = router_stats(routing, None if valid_BT is None else valid_BT.reshape(-1))
    out_RD = _experts_on_mesh(params["experts"], x_RD, routing.experts, routing.weights)
    return out_RD.reshape(batch, length, width), stats


def _experts_on_mesh(
    params: Tree, x_RD: jax.Array, experts_RK: jax.Array, weights_RK: jax.Array
) -> jax.Array:
    """`expert_mlp` where the mesh shards it.

    Tokens are gathered along the expert axis, each device computes its own experts and its own slice of the
    hidden width, and the partial sums are scattered back: two collectives per layer. Everything between is
    local, so each device sorts and multiplies only what it holds.
    """
    mesh = current_mesh()
    if mesh is None:
        return expert_mlp(x_RD, Experts(params["gate_up"], params["down"]), experts_RK, weights_RK)
    num_experts = params["gate_up"].shape[0]

    def local(params: Tree, x_RD: jax.Array, experts_RK: jax.Array, weights_RK: jax.Array) -> jax.Array:
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        partial_RD = expert_mlp(
            gather(x_RD),
            Experts(params["gate_up"], params["down"]),
            gather(experts_RK),
            gather(weights_RK),
            num_experts=num_experts,
            first=jax.lax.axis_index("expert") * params["gate_up"].shape[0],
        )
        wide_RD = jax.lax.psum(partial_RD.astype(jnp.float32), "tensor")
        return jax.lax.psum_scatter(wide_RD, "expert", tiled=True).astype(x_RD.dtype)

    # shard_map wants equal parts; a single prompt may have any number of rows. Those added weigh nothing.
    missing = -x_RD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padded = (jnp.pad(x, ((0, missing), (0, 0))) for x in (x_RD, experts_RK, weights_RK))
    weights = {"gate_up": P("expert", None, "tensor", None), "down": P("expert", None, "tensor")}
    rows = P(BATCH_AXES)
    out_RD = jax.shard_map(
        local, mesh=mesh, in_specs=(weights, rows, rows, rows), out_specs=rows, check_vma=False
    )(params, *padded)
    return out_RD[: x_RD.shape[0]]
