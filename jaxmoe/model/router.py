"""The router: which experts a token goes to, and with what weight."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from jaxmoe.params import Tree, param


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Softmax over all experts, then the top k.

    Attributes:
        renormalize: divide the k weights by their sum.
        weight_dtype: dtype of the combine weights: "float32", or "model" to round them to the activations'.
        jitter: in training, multiply the layer's input by uniform(1 - jitter, 1 + jitter) noise
            (Switch Transformer, arXiv 2101.03961, section 2.2).
    """

    num_experts: int
    top_k: int
    renormalize: bool
    weight_dtype: Literal["float32", "model"]
    jitter: float = 0.0


class Routing(NamedTuple):
    """Choices of R tokens: experts (R, K) int32, weights (R, K), and the raw logits (R, E)."""

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


def router_params(spec: RouterSpec, width: int) -> Tree:
    """Declaration of the router's linear map."""
    return {"weight": param("ED", {"E": spec.num_experts, "D": width}, role="router")}


def route(params: Tree, spec: RouterSpec, x_RD: jax.Array) -> Routing:
    """x (R, D) → `Routing`. Scores are a float32 softmax of logits in x's dtype."""
    logits_RE = jnp.matmul(x_RD, params["weight"].T, precision=Precision.HIGHEST)
    probabilities_RE = jax.nn.softmax(logits_RE.astype(jnp.float32), axis=-1)
    weights_RK, experts_RK = jax.lax.top_k(probabilities_RE, spec.top_k)
    if spec.renormalize:
        weights_RK = weights_RK / jnp.sum(weights_RK, axis=-1, keepdims=True)
    if spec.weight_dtype == "model":
        weights_RK = weights_RK.astype(x_RD.dtype)
    return Routing(experts_RK, weights_RK, logits_RE)


def router_stats(routing: Routing, valid_R: jax.Array | None) -> RouterStats:
    """Sum up a layer's routing.

    Args:
        routing: of R tokens.
        valid_R: (R,) bool, false for padding, which counts nowhere; None when every token is valid.
    """
    rows, num_experts = routing.logits.shape
    weight_R = jnp.ones((rows,), jnp.float32) if valid_R is None else valid_R.astype(jnp.float32)
    # One-hot products instead of a scatter-add: deterministic on every device. HIGHEST: never rounded to TF32.
    chosen_RE = jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32).sum(axis=1)
    # The dtype that the logits have: the balance loss of transformers takes its softmax there.
    probabilities_RE = jax.nn.softmax(routing.logits, axis=-1).astype(jnp.float32)
    lse_R = jax.nn.logsumexp(routing.logits.astype(jnp.float32), axis=-1)
    total = functools.partial(jnp.matmul, weight_R, precision=Precision.HIGHEST)
    return RouterStats(
        load=jax.lax.stop_gradient(total(chosen_RE)),
        probability=total(probabilities_RE),
        z=total(lse_R * lse_R),
        tokens=weight_R.sum(),
    )


def jitter(x: jax.Array, amount: float, key: jax.Array) -> jax.Array:
    """x times uniform noise in [1 - amount, 1 + amount)."""
    return x * jax.random.uniform(key, x.shape, x.dtype, 1.0 - amount, 1.0 + amount)
