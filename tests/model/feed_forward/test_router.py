"""The router against a plain computation, token by token, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity

from jaxmoe.model.feed_forward.router import (
    Groups,
    InputScale,
    RouterSpec,
    route,
    router_params,
    router_stats,
)
from jaxmoe.model.norms import NormSpec

R, D, E = 37, 10, 12

SPECS = {
    "softmax": {"renormalize": False},
    "softmax, renormalised": {},
    "sigmoid": {"score": "sigmoid", "renormalize": False},
    "sigmoid, correction, groups": {
        "score": "sigmoid",
        "correction": "score",
        "groups": Groups(4, 2, "top2"),
        "sum_offset": 1e-20,
        "scale": 1.7,
    },
    "softmax, groups by their best, masked with 0 and weighed so": {
        "groups": Groups(4, 1, "max", 0.0, weigh_masked=True),
        "renormalize": False,
        "scale": 16.0,
    },
    "softmax, groups by their best two, masked with 0": {"groups": Groups(3, 1, "top2", 0.0), "top_k": 5},
    "softmax, correction, sum not below a bound": {"correction": "score", "least_sum": 0.4},
    "softmax of the chosen, with a bias": {"score": "logits", "bias": True, "renormalize": False},
    "sigmoid of capped logits": {"score": "sigmoid", "correction": "score", "logit_softcap": 1.5},
    "sigmoid, chosen by corrected logits": {"score": "sigmoid", "correction": "logit"},
    "normed and scaled input, scale per expert": {
        "input_scale": InputScale(NormSpec(1e-3, "rms_float32")),
        "expert_scale": True,
    },
}


def softmax(x):
    shares = np.exp(x - x.max())
    return shares / shares.sum()


def plain(params, spec, x):
    """Experts and weights of one token, in float64."""
    if spec.input_scale is not None:
        x = x / np.sqrt(np.mean(x * x) + spec.input_scale.norm.eps) * params["input_scale"] / math.sqrt(D)
    logits = params["weight"] @ x + params.get("bias", 0.0)
    if spec.logit_softcap is not None:
        logits = spec.logit_softcap * np.tanh(logits / spec.logit_softcap)
    scores = logits
    if spec.score in ("softmax", "sigmoid"):
        scores = softmax(logits) if spec.score == "softmax" else 1 / (1 + np.exp(-logits))
    ranks = (logits if spec.correction == "logit" else scores) + params.get("correction", 0.0)
    if spec.groups is not None:
        size = E // spec.groups.count
        members = [range(g * size, (g + 1) * size) for g in range(spec.groups.count)]
        depth = 1 if spec.groups.rank_by == "max" else 2
        best = [sum(sorted(ranks[list(group)])[-depth:]) for group in members]
        kept = {e for g in np.argsort(best)[::-1][: spec.groups.keep] for e in members[g]}
        ranks = np.array([ranks[e] if e in kept else spec.groups.masked for e in range(E)])
        if spec.groups.weigh_masked:
            scores = np.array([scores[e] if e in kept else 0.0 for e in range(E)])
    experts = sorted(range(E), key=lambda e: (-ranks[e], e))[: spec.top_k]
    weights = scores[experts]
    if spec.score == "logits":
        weights = softmax(weights)
    if spec.renormalize:
        weights = weights / max(weights.sum() + spec.sum_offset, spec.least_sum)
    return experts, weights * spec.scale * params.get("expert_scale", np.ones(E))[experts]


def case(options):
    spec = RouterSpec(
        **{"num_experts": E, "top_k": 4, "renormalize": True, "weight_dtype": "float32"} | options
    )
    random = np.random.default_rng(3)
    params = {
        name: (declared.init == "ones")
        + (1.0 if name == "weight" else 0.3) * random.standard_normal(declared.shape)
        for name, declared in router_params(spec, D).items()
    }
    return spec, params, random.standard_normal((R, D))


@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS)
def test_choice_and_weights(options):
    spec, params, x = case(options)
    found = route(jax.tree.map(jnp.float32, params), spec, jnp.float32(x))
    chosen = []
    for row in range(R):
        experts, weights = plain(params, spec, x[row])
        assert found.experts[row].tolist() == experts
        np.testing.assert_allclose(found.weights[row], weights, rtol=2e-5, atol=1e-6)
        chosen += experts
    stats = router_stats(found, None)
    np.testing.assert_array_equal(stats.load, np.bincount(chosen, minlength=E))
    top = np.argsort(-np.asarray(found.logits), axis=1)[:, : spec.top_k]
    top_load = np.bincount(top.reshape(-1), minlength=E)
    np.testing.assert_array_equal(parity.stats_of_highest_logits(found, None).load, top_load)
    if "groups" in options or "correction" in options:
        assert (stats.load != top_load).any(), "nothing but the logits mattered"


def test_a_correction_is_no_part_of_the_weights_nor_of_their_gradient():
    spec, params, x = case(SPECS["sigmoid, correction, groups"])
    params = jax.tree.map(jnp.float32, params)

    def total(params):
        return jnp.sum(jnp.sin(route(params, spec, jnp.float32(x)).weights))

    gradients = jax.grad(total)(params)
    assert not np.asarray(gradients["correction"]).any()
    assert float(jnp.abs(gradients["weight"]).max()) > 1e-3
    assert router_params(spec, D)["correction"].float32


@pytest.mark.parametrize(("logits", "weights"), [("model", "model"), ("float32", "float32")])
def test_dtypes(logits, weights):
    spec, params, x = case({"logits_dtype": logits, "weight_dtype": weights})
    found = route(jax.tree.map(jnp.float32, params), spec, jnp.bfloat16(x))
    assert found.logits.dtype == (jnp.bfloat16 if logits == "model" else jnp.float32)
    assert found.weights.dtype == (jnp.bfloat16 if weights == "model" else jnp.float32)


def test_weights_keep_the_logits_and_choices_alone_and_have_no_scatter():
    spec = RouterSpec(num_experts=E, top_k=3, renormalize=True, weight_dtype="float32")
    params = {"weight": jax.random.normal(jax.random.key(0), (E, D))}
    x = jax.random.normal(jax.random.key(1), (R, D))

    def weights(x):
        routing = route(params, spec, x)
        return routing.weights, router_stats(routing, None).z

    _, pull = jax.vjp(weights, x)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.ndim == 2)
    assert set(kept) <= {(R, 3), (R, E), (E, D)}
    assert kept.count((R, E)) <= 2  # once each for the weights and the statistics: the same array
    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(weights, x)[1]((jnp.ones((R, 3)), jnp.ones(()))))(x)
    assert "scatter" not in str(jaxpr)
