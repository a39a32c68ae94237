"""The terms that keep experts evenly loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity

from jaxmoe.model.feed_forward.router import RouterSpec, RouterStats, route, router_stats
from jaxmoe.training.balance import load_balancing_loss, router_z_loss


def stats_of(load, probability, tokens):
    load = jnp.asarray(load)
    return RouterStats(load, jnp.asarray(probability), jnp.zeros(len(load)), jnp.asarray(tokens))


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    tokens, top_k = 12.0, 2
    balanced = stats_of([[tokens * top_k / 4] * 4], [[tokens / 4] * 4], [tokens])
    assert float(load_balancing_loss(balanced)) == pytest.approx(1.0)
    assert float(parity.pooled_load_balancing_loss(balanced)) == pytest.approx(top_k)
    collapsed = stats_of([[tokens, 0.0, 0.0, 0.0]], [[tokens, 0.0, 0.0, 0.0]], [tokens])
    assert float(load_balancing_loss(collapsed)) == pytest.approx(4.0)


def test_imbalances_of_layers_do_not_cancel():
    a, b = [10.0, 0.0], [0.0, 10.0]
    stats = stats_of([a, b], [a, b], [10.0, 10.0])
    assert float(load_balancing_loss(stats)) == pytest.approx(2.0)
    assert float(parity.pooled_load_balancing_loss(stats)) == pytest.approx(1.0)


def test_balance_gradient_reaches_the_router_and_ignores_padding():
    rng = np.random.default_rng(1)
    spec = RouterSpec(num_experts=6, top_k=2, renormalize=True, weight_dtype="float32")
    x = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    valid = jnp.arange(9) < 7

    def terms(weight, x):
        one = router_stats(route({"weight": weight}, spec, x), valid)
        stats = jax.tree.map(lambda a: a[None], one)
        return load_balancing_loss(stats) + router_z_loss(stats), one

    grad, one = jax.grad(terms, has_aux=True)(weight, x)
    assert float(jnp.abs(grad).max()) > 1e-3
    assert float(one.load.sum()) == 2 * 7
    assert float(one.tokens) == 7
    changed, _ = jax.grad(terms, has_aux=True)(weight, x.at[7:].set(100.0))
    np.testing.assert_array_equal(grad, changed)
