"""The mixture-of-experts feed-forward: route, dispatch, experts, combine."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.expert_mlp import Activation, Experts, expert_mlp
from jaxmoe.model.feed_forward.mlp import MLPSpec, mlp, mlp_params
from jaxmoe.model.feed_forward.router import (
    RouterSpec,
    RouterStats,
    jitter,
    route,
    router_params,
    router_stats,
)
from jaxmoe.parallel.sharding import BATCH_AXES, current_mesh
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class SharedSpec:
    """A feed-forward that every token goes through beside its routed experts.

    Attributes:
        gated: its output is multiplied by sigmoid(gate · x), one number per token.
        averaged: the layer gives the mean of both outputs and not their sum.
    """

    mlp: MLPSpec
    gated: bool = False
    averaged: bool = False


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """E experts of hidden width F behind a router.

    Attributes:
        activation: of the experts.
        bias: on both matrices of every expert.
        shared: added to what the experts give.
    """

    router: RouterSpec
    hidden: int
    activation: Activation = Activation()
    bias: bool = False
    shared: SharedSpec | None = None


def moe_params(spec: MoESpec, width: int) -> Tree:
    """Declarations of router, experts and shared expert for a model of `width`."""
    sizes = {"D": width, "E": spec.router.num_experts, "F": spec.hidden, "G": spec.activation.parts, "J": 1}
    experts = {"gate_up": param("EGFD", sizes), "down": param("EDF", sizes)}
    if spec.bias:
        experts["gate_up_bias"] = param("EGF", sizes, role="vector", init="zeros")
        experts["down_bias"] = param("ED", sizes, role="vector", init="zeros")
    params: dict[str, dict[str, Param]] = {"router": router_params(spec.router, width), "experts": experts}
    if spec.shared is not None:
        params["shared"] = mlp_params(spec.shared.mlp, width)
        if spec.shared.gated:
            params["shared"]["gate"] = param("JD", sizes)
    return params


def moe(
    params: Tree,
    spec: MoESpec,
    x_BTD: jax.Array,
    valid_BT: jax.Array | None,
    key: jax.Array | None,
    router_sees: jax.Array | None = None,
) -> tuple[jax.Array, RouterStats]:
    """x (B, T, D) → (B, T, D) and the layer's router statistics.

    Args:
        params: as declared by `moe_params`.
        spec: the layer.
        x_BTD: activations.
        valid_BT: (B, T) bool, false for padding; padding is computed but counted nowhere.
        key: PRNG key for router jitter, given in training only.
        router_sees: (B, T, D), by default x.
    """
    if key is not None and spec.router.jitter:
        x_BTD = jitter(x_BTD, spec.router.jitter, key)
    width = x_BTD.shape[-1]
    x_RD = x_BTD.reshape(-1, width)
    routing = route(
        params["router"], spec.router, x_RD if router_sees is None else router_sees.reshape(-1, width)
    )
    stats = router_stats(spec.router, routing, None if valid_BT is None else valid_BT.reshape(-1))
    out_RD = _experts_on_mesh(params["experts"], spec.activation, x_RD, routing.experts, routing.weights)
    out_BTD = out_RD.reshape(x_BTD.shape)
    if spec.shared is not None:
        shared_BTD = mlp(params["shared"], spec.shared.mlp, x_BTD)
        if spec.shared.gated:
            gate_BT1 = jnp.einsum("btd,jd->btj", x_BTD, params["shared"]["gate"])
            shared_BTD = shared_BTD * jax.nn.sigmoid(gate_BT1)
        out_BTD = out_BTD + shared_BTD
        if spec.shared.averaged:
            out_BTD = out_BTD / 2
    return out_BTD, stats


def _experts_on_mesh(
    params: Tree, activation: Activation, x_RD: jax.Array, experts_RK: jax.Array, weights_RK: jax.Array
) -> jax.Array:
    """`expert_mlp` where the mesh shards it.

    Tokens are gathered along the expert axis, each device computes its own experts and its own slice of the
    hidden width, and the partial sums are scattered back: two collectives per layer. Everything between is
    local, so each device sorts and multiplies only what it holds.
    """
    mesh = current_mesh()
    if mesh is None:
        return expert_mlp(x_RD, Experts(**params), experts_RK, weights_RK, activation=activation)
    num_experts = params["down"].shape[0]

    def local(params: Tree, x_RD: jax.Array, experts_RK: jax.Array, weights_RK: jax.Array) -> jax.Array:
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        if "down_bias" in params:  # the partial sums over slices of the hidden width add it up once
            first = jax.lax.axis_index("tensor") == 0
            params = params | {"down_bias": jnp.where(first, params["down_bias"], 0)}
        partial_RD = expert_mlp(
            gather(x_RD),
            Experts(**params),
            gather(experts_RK),
            gather(weights_RK),
            activation=activation,
            num_experts=num_experts,
            first=jax.lax.axis_index("expert") * params["down"].shape[0],
        )
        wide_RD = jax.lax.psum(partial_RD.astype(jnp.float32), "tensor")
        return jax.lax.psum_scatter(wide_RD, "expert", tiled=True).astype(x_RD.dtype)

    # shard_map wants equal parts; a single prompt may have any number of rows. Those added weigh nothing.
    missing = -x_RD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padded = (jnp.pad(x, ((0, missing), (0, 0))) for x in (x_RD, experts_RK, weights_RK))
    parts = {
        "gate_up": P("expert", None, "tensor", None),
        "down": P("expert", None, "tensor"),
        "gate_up_bias": P("expert", None, "tensor"),
        "down_bias": P("expert"),
    }
    rows = P(BATCH_AXES)
    out_RD = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=({name: parts[name] for name in params}, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(params, *padded)
    return out_RD[: x_RD.shape[0]]
