"""Dispatch and combine against plain indexing, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.dispatch import combine, gather_to_experts, make_dispatch

R, K, E, D = 13, 3, 7, 5


def routing(seed: int = 0, only: tuple[int, ...] = tuple(range(E))) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(only)[:K] for _ in range(R)]).astype(np.int32)


def test_order_is_stable_and_complete():
    experts = routing()
    dispatch = make_dispatch(jnp.asarray(experts), E)
    order = np.asarray(dispatch.order)
    assert sorted(order) == list(range(R * K))
    by_expert = experts.reshape(-1)[order]
    assert (np.diff(by_expert) >= 0).all()
    for expert in range(E):
        assert (np.diff(order[by_expert == expert]) > 0).all(), "slots of an expert keep the tokens' order"
    assert np.asarray(dispatch.group_sizes).tolist() == np.bincount(experts.reshape(-1), minlength=E).tolist()
    assert (order[np.asarray(dispatch.inverse)].reshape(-1) == np.arange(R * K)).all()


@pytest.mark.parametrize(("first", "held"), [(0, 3), (3, 4), (6, 1), (2, 5)])
def test_held_experts_come_first(first, held):
    experts = routing(1)
    dispatch = make_dispatch(jnp.asarray(experts), E, first, held)
    sizes = np.bincount(experts.reshape(-1), minlength=E)[first : first + held]
    assert np.asarray(dispatch.group_sizes).tolist() == sizes.tolist()
    mine = experts.reshape(-1)[np.asarray(dispatch.order)][: sizes.sum()]
    assert (mine == np.repeat(np.arange(first, first + held), sizes)).all()


def test_experts_without_tokens():
    dispatch = make_dispatch(jnp.asarray(routing(2, only=(1, 4, 5))), E)
    assert np.asarray(dispatch.group_sizes).tolist() == [0, R, 0, 0, R, R, 0]


def test_gather_and_combine_match_indexing():
    rng = np.random.default_rng(3)
    x, weights = rng.normal(size=(R, D)), rng.normal(size=(R, K))
    scale = rng.normal(size=(E, 1))
    experts = routing(3)
    dispatch = make_dispatch(jnp.asarray(experts), E)

    def ours(x, weights):
        rows = gather_to_experts(x, dispatch)
        group = jnp.repeat(jnp.arange(E), dispatch.group_sizes, total_repeat_length=R * K)
        return combine(jnp.sin(rows) * scale[group], weights, dispatch)

    def plain(x, weights):
        return jnp.einsum("rkd,rk->rd", jnp.sin(x)[:, None] * scale[experts], weights)

    with jax.enable_x64(True):
        args = jnp.asarray(x), jnp.asarray(weights)
        np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-5, atol=1e-6)
        pull = jnp.asarray(rng.normal(size=(R, D)))
        grads = jax.grad(lambda *a: jnp.sum(ours(*a) * pull), argnums=(0, 1))(*args)
        expected = jax.grad(lambda *a: jnp.sum(plain(*a) * pull), argnums=(0, 1))(*args)
        for grad, want in zip(grads, expected, strict=True):
            np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)


def test_no_scatter_in_either_direction():
    """A scatter-add is neither deterministic nor fast on GPUs."""
    experts = jnp.asarray(routing(4))

    def loss(x, weights):
        dispatch = make_dispatch(experts, E)
        return combine(gather_to_experts(x, dispatch), weights, dispatch).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.ones((R, D)), jnp.ones((R, K))).as_text()
    assert "stablehlo.gather" in text
    assert "scatter" not in text


def test_combine_adds_in_float32():
    """300 ones and a large number: in bfloat16 the ones would be lost."""
    y = jnp.ones((300, 1), jnp.bfloat16).at[0].set(512)
    dispatch = make_dispatch(jnp.arange(300, dtype=jnp.int32).reshape(1, 300), 300)
    out = combine(y, jnp.ones((1, 300), jnp.bfloat16), dispatch)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == float(jnp.bfloat16(512 + 299))
