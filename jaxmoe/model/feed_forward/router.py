"""The router: which experts a token goes to, and with what weight."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from jaxmoe.model.feed_forward.sparsemixer import sparsemixer
from jaxmoe.model.linear import add_bias, along_last, in_dtype, linear
from jaxmoe.model.norms import NormSpec, apply_norm
from jaxmoe.params import Param, Tree, param


@dataclasses.dataclass(frozen=True)
class Groups:
    """Choose among the experts of the best groups only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Attributes:
        count: groups, of equally many neighbouring experts.
        keep: how many of them a token may choose from.
        rank_by: of a group's scores the highest, or the sum of the two highest.
        masked: what the scores of other groups become: −inf, or 0, with which they are still chosen when nothing
            kept is above 0.
        weigh_masked: weights are taken from the masked scores, 0 for such an expert.
    """

    count: int
    keep: int
    rank_by: Literal["max", "top2"]
    masked: float = -math.inf
    weigh_masked: bool = False


@dataclasses.dataclass(frozen=True)
class InputScale:
    """The router sees norm(x) · scale / sqrt(D), with a norm that has no scale of its own (Gemma 4)."""

    norm: NormSpec


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Scores of all experts, a choice of K of them, weights of the chosen ones.

    Attributes:
        renormalize: divide the K weights by their sum.
        weight_dtype: dtype of the combine weights: "float32", or "model" to round them to the activations'.
        score: of the logits: "softmax" over all experts or "sigmoid", in float32; "logits" chooses by the logits
            and weighs by a softmax over those chosen; "sparsemixer" is SparseMixer-2 (arXiv 2409.12136), which
            gives weights of its own.
        logits_dtype: "float32" multiplies input and weight in float32, "model" in the activations' dtype.
        logit_softcap: logits become cap · tanh(logits / cap), in float32.
        softmax_dtype: of "softmax" and "logits": "model" is that of the logits.
        bias: a bias on the logits.
        correction: a constant per expert, in float32, is added for the choice alone: to the scores or to the
            logits (arXiv 2408.15664).
        groups: choose among the best groups only.
        sum_offset: added to the sum that weights are divided by.
        least_sum: that sum is at least this.
        scale: factor of the weights, after that.
        expert_scale: a factor per expert, a parameter, after that.
        input_scale: what the router sees of its input.
        float32: the matrix is kept in float32.
        jitter: in training, multiply the layer's input by uniform(1 - jitter, 1 + jitter) noise
            (Switch Transformer, arXiv 2101.03961, section 2.2).
        threshold: of "sparsemixer": relative distance to the highest logit beyond which experts are left out.
    """

    num_experts: int
    top_k: int
    renormalize: bool
    weight_dtype: Literal["float32", "model"]
    score: Literal["softmax", "sigmoid", "logits", "sparsemixer"] = "softmax"
    logits_dtype: Literal["float32", "model"] = "model"
    logit_softcap: float | None = None
    softmax_dtype: Literal["float32", "model"] = "float32"
    bias: bool = False
    correction: Literal["none", "score", "logit"] = "none"
    groups: Groups | None = None
    sum_offset: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    expert_scale: bool = False
    input_scale: InputScale | None = None
    float32: bool = False
    jitter: float = 0.0
    threshold: float = 0.0

    def problems(self) -> Iterator[str]:
        """More experts than there are, groups that do not divide them."""
        chosen, experts, groups = self.top_k, self.num_experts, self.groups
        if chosen > experts:
            yield f"num_experts_per_tok {chosen} is more than the {experts} experts"
            return
        if groups is None:
            return
        if experts % groups.count or groups.keep > groups.count:
            yield (
                f"n_group {groups.count} and topk_group {groups.keep}: expected groups that divide the {experts} "
                "experts, and no more kept than there are"
            )
            return
        size = experts // groups.count
        if size < 2 and groups.rank_by == "top2":
            yield f"n_group {groups.count} leaves {size} expert per group: expected two or more"
        elif chosen > groups.keep * size:
            yield (
                f"num_experts_per_tok {chosen} is more than the {groups.keep * size} experts of {groups.keep} groups"
            )

    def traits(self) -> Iterator[str]:
        """In the order of the table of models in the README."""
        yield "softmax of the chosen" if self.score == "logits" else self.score
        told = {
            "renormalised": self.renormalize,
            "bias": self.bias,
            "logit softcap": self.logit_softcap is not None,
            "correction bias": self.correction != "none",
            "groups": self.groups is not None and self.groups.count > 1,
            "scaled weights": self.scale != 1.0,
            "scale per expert": self.expert_scale,
            "normed input": self.input_scale is not None,
        }
        yield from (text for text, holds in told.items() if holds)


class Routing(NamedTuple):
    """Choices of R tokens: experts (R, K) int32, weights (R, K), and the logits (R, E)."""

    experts: jax.Array
    weights: jax.Array
    logits: jax.Array


class RouterStats(NamedTuple):
    """Sums over the valid tokens of one layer, or with a leading axis over the MoE layers in order.

    They add up over micro-batches and shards; every balance term and monitor reads these same numbers.

    Attributes:
        load: (E,) float32, how often each expert was chosen; sums to K * tokens.
        probability: (E,) float32, sum of the softmax over the raw logits; the only differentiable balance path.
        z: () float32, sum of logsumexp(logits)².
        tokens: () float32, number of valid tokens.
    """

    load: jax.Array
    probability: jax.Array
    z: jax.Array
    tokens: jax.Array


def router_params(spec: RouterSpec, width: int) -> dict[str, Param]:
    """Declarations: the linear map, and whatever else the spec has."""
    sizes = {"E": spec.num_experts, "D": width}
    params = {"weight": param("ED", sizes, role="router", float32=spec.float32)}
    if spec.bias:
        params["bias"] = param("E", sizes, role="vector", init="zeros")
    if spec.correction != "none":
        params["correction"] = param("E", sizes, role="constant", init="zeros", float32=True)
    if spec.input_scale is not None:
        params["input_scale"] = param("D", sizes, role="vector", init="ones")
    if spec.expert_scale:
        params["expert_scale"] = param("E", sizes, role="vector", init="ones")
    return params


def route(params: Tree, spec: RouterSpec, x_RD: jax.Array) -> Routing:
    """x (R, D) → `Routing`."""
    logits_RE = _logits(params, spec, x_RD)
    dtype = x_RD.dtype if spec.weight_dtype == "model" else jnp.float32
    if spec.score == "sparsemixer":
        experts_RK, chosen_RK = sparsemixer(logits_RE, spec.top_k, spec.threshold)
        return Routing(experts_RK, _weights(params, spec, experts_RK, chosen_RK).astype(dtype), logits_RE)
    experts_RK, kept_RE = _choose(params, spec, jax.lax.stop_gradient(logits_RE))

    def weigh(
        params: Tree, logits_RE: jax.Array, experts_RK: jax.Array, kept_RE: jax.Array | None
    ) -> jax.Array:
        chosen_RK = _chosen_scores(spec, logits_RE, experts_RK, kept_RE)
        return _weights(params, spec, experts_RK, chosen_RK).astype(dtype)

    # The backward pass makes it from the logits again, which are less than what lies between.
    weights_RK = jax.checkpoint(weigh, prevent_cse=False)(params, logits_RE, experts_RK, kept_RE)
    return Routing(experts_RK, weights_RK, logits_RE)


def _weights(params: Tree, spec: RouterSpec, experts_RK: jax.Array, weights_RK: jax.Array) -> jax.Array:
    """The scores of the chosen (R, K) as weights (R, K)."""
    if spec.renormalize:
        total_R1 = jnp.sum(weights_RK, axis=-1, keepdims=True) + spec.sum_offset
        weights_RK = weights_RK / (jnp.maximum(total_R1, spec.least_sum) if spec.least_sum else total_R1)
    if spec.scale != 1.0:
        weights_RK = weights_RK * spec.scale
    if spec.expert_scale:
        weights_RK = weights_RK * params["expert_scale"][experts_RK]
    return weights_RK


def _logits(params: Tree, spec: RouterSpec, x_RD: jax.Array) -> jax.Array:
    if spec.input_scale is not None:
        normal_RD = apply_norm(spec.input_scale.norm, x_RD, None)
        x_RD = along_last(params["input_scale"], normal_RD) * normal_RD
        x_RD = x_RD * jnp.asarray(x_RD.shape[-1] ** -0.5, x_RD.dtype)
    dtype = jnp.float32 if spec.logits_dtype == "float32" else x_RD.dtype
    weight_ED = in_dtype(params["weight"], dtype)
    logits_RE = linear(x_RD.astype(dtype), weight_ED, precision=Precision.HIGHEST)
    if spec.bias:
        logits_RE = add_bias(logits_RE, params["bias"])
    if spec.logit_softcap is None:
        return logits_RE
    return spec.logit_softcap * jnp.tanh(logits_RE.astype(jnp.float32) / spec.logit_softcap)


def _scores(spec: RouterSpec, logits_RE: jax.Array) -> jax.Array:
    """(R, E) float32."""
    wide_RE = logits_RE.astype(jnp.float32)
    if spec.score == "logits":
        return wide_RE
    return jax.nn.sigmoid(wide_RE) if spec.score == "sigmoid" else _softmax(spec, logits_RE)


def _softmax(spec: RouterSpec, logits: jax.Array) -> jax.Array:
    """Over the last axis, float32."""
    dtype = logits.dtype if spec.softmax_dtype == "model" else jnp.float32
    return jax.nn.softmax(logits.astype(dtype), axis=-1).astype(jnp.float32)


def _choose(params: Tree, spec: RouterSpec, logits_RE: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Experts (R, K), and which were in the best groups (R, E); None without groups."""
    ranks_RE = logits_RE.astype(jnp.float32) if spec.correction == "logit" else _scores(spec, logits_RE)
    if spec.correction != "none":
        ranks_RE = add_bias(ranks_RE, params["correction"])
    if spec.groups is None:
        return jax.lax.top_k(ranks_RE, spec.top_k)[1], None
    kept_RE = _in_best_groups(spec.groups, ranks_RE)
    ranks_RE = jnp.where(kept_RE, ranks_RE, spec.groups.masked)
    return jax.lax.top_k(ranks_RE, spec.top_k)[1], kept_RE


def _chosen_scores(
    spec: RouterSpec, logits_RE: jax.Array, experts_RK: jax.Array, kept_RE: jax.Array | None
) -> jax.Array:
    """Those of the chosen experts (R, K), not yet renormalised."""
    scores_RE = _scores(spec, logits_RE)
    if kept_RE is not None and spec.groups is not None and spec.groups.weigh_masked:
        scores_RE = jnp.where(kept_RE, scores_RE, 0.0)
    chosen_RK = _picked(spec.num_experts, scores_RE, experts_RK)
    return _softmax(spec, chosen_RK.astype(logits_RE.dtype)) if spec.score == "logits" else chosen_RK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _picked(num_experts: int, scores_RE: jax.Array, experts_RK: jax.Array) -> jax.Array:
    """The scores (R, K) at different experts, whose gradient is no scatter-add."""
    del num_experts
    return jnp.take_along_axis(scores_RE, experts_RK, axis=-1)


def _picked_forward(
    num_experts: int, scores_RE: jax.Array, experts_RK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _picked(num_experts, scores_RE, experts_RK), experts_RK


def _picked_backward(
    num_experts: int, experts_RK: jax.Array, d_picked_RK: jax.Array
) -> tuple[jax.Array, None]:
    is_it_RKE = experts_RK[:, :, None] == jnp.arange(num_experts, dtype=experts_RK.dtype)[None, None]
    return jnp.where(is_it_RKE, d_picked_RK[:, :, None], 0.0).sum(axis=1), None


_picked.defvjp(_picked_forward, _picked_backward)


def _in_best_groups(groups: Groups, ranks_RE: jax.Array) -> jax.Array:
    """(R, E) bool."""
    per_group = ranks_RE.reshape(ranks_RE.shape[0], groups.count, -1)
    best = jax.lax.top_k(per_group, 1 if groups.rank_by == "max" else 2)[0].sum(axis=-1)
    kept = jax.lax.top_k(best, groups.keep)[1]
    is_kept = jax.nn.one_hot(kept, groups.count, dtype=jnp.bool_).any(axis=1)
    return jnp.repeat(is_kept, per_group.shape[-1], axis=1)


def router_stats(routing: Routing, valid_R: jax.Array | None) -> RouterStats:
    """Sum up a layer's routing.

    Args:
        routing: of R tokens.
        valid_R: (R,) bool, false for padding, which counts nowhere; None when every token is valid.
    """
    rows, num_experts = routing.logits.shape
    weight_R = jnp.ones((rows,), jnp.float32) if valid_R is None else valid_R.astype(jnp.float32)
    # One-hot products instead of a scatter-add: deterministic on every device. HIGHEST: never rounded to TF32.
    total = functools.partial(jnp.matmul, weight_R, precision=Precision.HIGHEST)
    chosen_RE = jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32).sum(axis=1)

    def of_logits(logits_RE: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The dtype that the logits have: the balance loss of transformers takes its softmax there.
        probabilities_RE = jax.nn.softmax(logits_RE, axis=-1).astype(jnp.float32)
        return probabilities_RE, jax.nn.logsumexp(logits_RE.astype(jnp.float32), axis=-1) ** 2

    probabilities_RE, squares_R = jax.checkpoint(of_logits, prevent_cse=False)(routing.logits)
    return RouterStats(
        load=jax.lax.stop_gradient(total(chosen_RE)),
        probability=total(probabilities_RE),
        z=total(squares_R),
        tokens=weight_R.sum(),
    )


def jitter(x: jax.Array, amount: float, key: jax.Array) -> jax.Array:
    """x times uniform noise in [1 - amount, 1 + amount)."""
    return x * jax.random.uniform(key, x.shape, x.dtype, 1.0 - amount, 1.0 + amount)
