"""The mixture-of-experts feed-forward: route, dispatch, experts, combine."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jaxmoe.kernels.expert_mlp import Activation
from jaxmoe.model.blocks import FeedForward
from jaxmoe.model.feed_forward.mlp import MLPSpec, mlp, mlp_params
from jaxmoe.model.feed_forward.router import (
    RouterSpec,
    RouterStats,
    jitter,
    route,
    router_params,
    router_stats,
)
from jaxmoe.model.linear import linear
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.norms import NormSpec, norm, norm_params
from jaxmoe.parallel.experts import experts_on_mesh
from jaxmoe.params import Param, Tree, count, param


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
class MoESpec(FeedForward):
    """E experts of hidden width F behind a router.

    Attributes:
        activation: of the experts.
        bias: on both matrices of every expert.
        shared: added to what the experts give.
        latent: C, the width that experts work in between two projections that all share; None for D. Router and
            `shared` see D (LatentMoE, as in Nemotron 3).
        norm: of what all of these together give (A.X K1, arXiv 2601.09200).
    """

    router: RouterSpec
    hidden: int
    activation: Activation = Activation()
    bias: bool = False
    shared: SharedSpec | None = None
    latent: int | None = None
    norm: NormSpec | None = None

    def params(self, width: int) -> Tree:
        """{"router": …, "experts": …, "latent": …, "shared": …, "moe_norm": …}."""
        tree: dict[str, Any] = {
            "router": router_params(self.router, width),
            "experts": _expert_params(self, width),
        }
        if self.latent is not None:
            sizes = {"C": self.latent, "D": width}
            tree["latent"] = {"in_proj": param("CD", sizes), "out_proj": param("DC", sizes)}
        if self.shared is not None:
            tree["shared"] = mlp_params(self.shared.mlp, width)
            if self.shared.gated:
                tree["shared"]["gate"] = param("JD", {"J": 1, "D": width})
        if self.norm is not None:
            tree |= norm_params("moe_norm", self.norm, width)
        return tree

    def apply(
        self, params: Tree, x_BTD: jax.Array, stream_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, RouterStats]:
        """x (B, T, D) → (B, T, D) and the layer's router statistics."""
        del stream_BTD
        return moe(params, self, x_BTD, context)

    def sparse_params(self, tokens: int) -> tuple[str, ...]:
        """The experts, where there are more than so many tokens can choose."""
        return ("experts",) if tokens * self.router.top_k < self.router.num_experts else ()

    def idle_params(self, width: int) -> int:
        """Those of the experts that a token is not sent to."""
        router = self.router
        return count(_expert_params(self, width)) * (router.num_experts - router.top_k) // router.num_experts

    def problems(self) -> Iterator[str]:
        """Of the router."""
        return self.router.problems()

    def describe(self) -> str:
        """Experts, how many are chosen, and the shared one."""
        shared = "" if self.shared is None else f"; shared {self.shared.mlp.hidden}"
        within = "" if self.latent is None else f" within {self.latent}"
        return f"{self.router.num_experts} experts of {self.hidden}{within}, top {self.router.top_k}{shared}"

    def traits(self) -> Iterator[str]:
        """In the order of the table of models in the README."""
        yield f"top {self.router.top_k} of {self.router.num_experts}"
        yield from self.router.traits()
        if self.activation.name != "silu":
            yield self.activation.name
        if self.bias:
            yield "biases"
        if self.latent is not None:
            yield "latent experts"
        if self.shared is not None:
            yield "gated shared expert" if self.shared.gated else "shared expert"
        if self.norm is not None:
            yield "norm after experts"


@dataclasses.dataclass(frozen=True)
class DenseMoESpec(FeedForward):
    """A dense feed-forward and experts side by side, their outputs normed apart and added (Gemma 4).

    The dense one sees what the layer's norm gives. The router sees the residual stream itself, and the experts
    a norm of their own of it.

    Attributes:
        norm: of all three further norms: what the dense one gives, what experts see, what they give.
    """

    dense: MLPSpec
    moe: MoESpec
    norm: NormSpec

    def params(self, width: int) -> Tree:
        """Those of both, and the norms."""
        tree = self.dense.params(width) | self.moe.params(width)
        for name in ("dense_post_norm", "experts_norm", "experts_post_norm"):
            tree |= norm_params(name, self.norm, width)
        return tree

    def apply(
        self, params: Tree, x_BTD: jax.Array, stream_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, RouterStats]:
        """x and the residual stream (B, T, D) → (B, T, D) and the layer's router statistics."""
        dense_BTD = norm(params, "dense_post_norm", self.norm, mlp(params["mlp"], self.dense, x_BTD))
        experts_see = norm(params, "experts_norm", self.norm, stream_BTD)
        out, stats = moe(params, self.moe, experts_see, context, router_sees=stream_BTD)
        return dense_BTD + norm(params, "experts_post_norm", self.norm, out), stats

    def sparse_params(self, tokens: int) -> tuple[str, ...]:
        """Those of the experts."""
        return self.moe.sparse_params(tokens)

    def idle_params(self, width: int) -> int:
        """Those of the experts that a token is not sent to."""
        return self.moe.idle_params(width)

    def problems(self) -> Iterator[str]:
        """Of the experts."""
        return self.moe.problems()

    def describe(self) -> str:
        """Both."""
        return f"{self.dense.describe()}; {self.moe.describe()}"

    def traits(self) -> Iterator[str]:
        """Those of the experts, and that there is a dense one."""
        yield from self.moe.traits()
        yield "dense beside experts"


def _expert_params(spec: MoESpec, width: int) -> dict[str, Param]:
    within = width if spec.latent is None else spec.latent
    sizes = {"D": within, "E": spec.router.num_experts, "F": spec.hidden, "G": spec.activation.parts}
    experts = {"gate_up": param("EGFD", sizes), "down": param("EDF", sizes)}
    if spec.bias:
        experts["gate_up_bias"] = param("EGF", sizes, role="vector", init="zeros")
        experts["down_bias"] = param("ED", sizes, role="vector", init="zeros")
    return experts


def moe(
    params: Tree,
    spec: MoESpec,
    x_BTD: jax.Array,
    context: Context,
    router_sees: jax.Array | None = None,
) -> tuple[jax.Array, RouterStats]:
    """x (B, T, D) → (B, T, D) and the layer's router statistics.

    Args:
        params: as declared by `MoESpec.params`.
        spec: the layer.
        x_BTD: activations.
        context: of the batch; padding is computed but counted nowhere.
        router_sees: (B, T, D), by default x.
    """
    if context.key is not None and spec.router.jitter:
        x_BTD = jitter(x_BTD, spec.router.jitter, context.key)
    width = x_BTD.shape[-1]
    x_RD = x_BTD.reshape(-1, width)
    routing = route(
        params["router"], spec.router, x_RD if router_sees is None else router_sees.reshape(-1, width)
    )
    stats = router_stats(routing, None if context.valid is None else context.valid.reshape(-1))
    experts_see = x_RD if spec.latent is None else linear(x_RD, params["latent"]["in_proj"])
    out_RD = experts_on_mesh(
        params["experts"], spec.activation, experts_see, routing.experts, routing.weights, context.device
    )
    if spec.latent is not None:
        out_RD = linear(out_RD, params["latent"]["out_proj"])
    out_BTD = out_RD.reshape(x_BTD.shape)
    if spec.shared is not None:
        shared_BTD = mlp(params["shared"], spec.shared.mlp, x_BTD)
        if spec.shared.gated:
            shared_BTD = shared_BTD * jax.nn.sigmoid(linear(x_BTD, params["shared"]["gate"]))
        out_BTD = out_BTD + shared_BTD
        if spec.shared.averaged:
            out_BTD = out_BTD / 2
    if spec.norm is not None:
        out_BTD = norm(params, "moe_norm", spec.norm, out_BTD)
    return out_BTD, stats
