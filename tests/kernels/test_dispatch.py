"""The order of slots, and the way of rows back from it, against plain indexing."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.expert_mlp.dispatch import gather_sum, make_dispatch

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


def test_order_of_more_slots_and_experts_than_one_number_holds():
    """2^31 = slots · experts and more: expert and slot do not fit into one int32 any more."""
    experts = routing()
    few, many = (make_dispatch(jnp.asarray(experts), count, held=E) for count in (E, 2**31 // (R * K) + 1))
    for ours, theirs in zip(many, few, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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


def test_moves_match_indexing():
    rng = np.random.default_rng(3)
    x, weights = rng.normal(size=(R, D)).astype(np.float32), rng.normal(size=(R, K)).astype(np.float32)
    experts = routing(3)
    dispatch = make_dispatch(jnp.asarray(experts), E)
    scale = rng.normal(size=(E, 1)).astype(np.float32)
    group = np.repeat(np.arange(E), dispatch.group_sizes)
    y = np.sin(x[np.asarray(dispatch.order) // K]) * scale[group]
    plain = np.sin(x)[:, None] * scale[experts]
    weighted = np.einsum("rkd,rk->rd", plain, weights)
    np.testing.assert_allclose(
        gather_sum(jnp.asarray(y), dispatch, jnp.asarray(weights)), weighted, atol=1e-5
    )
    np.testing.assert_allclose(gather_sum(jnp.asarray(y), dispatch), plain.sum(axis=1), atol=1e-5)


def test_sums_are_taken_in_float32():
    """300 ones and a large number: in bfloat16 the ones would be lost."""
    y = jnp.ones((300, 1), jnp.bfloat16).at[0].set(512)
    dispatch = make_dispatch(jnp.arange(300, dtype=jnp.int32).reshape(1, 300), 300)
    out = gather_sum(y, dispatch, jnp.ones((1, 300), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == float(jnp.bfloat16(512 + 299))
