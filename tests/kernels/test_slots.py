"""The padded layout of slots, against plain loops in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.kernels.expert_mlp.mosaic.slots import make_slots, max_tiles, sum_choices

R, K = 37, 3


def routed(num_experts: int, first: int, held: int, only: list[int], seed: int = 0, tile: int = 8):
    """chosen, weights and the slots of experts first, …, first + held - 1 of num_experts."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(only)[:K] for _ in range(R)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (R, K)).astype(np.float32)
    dispatch = make_dispatch(jnp.asarray(chosen), num_experts, first, held)
    return chosen, weights, make_slots(dispatch, jnp.asarray(weights), tile)


LAYOUTS = [
    (7, 0, 7, list(range(7)), 8),
    (7, 0, 7, [1, 4, 5], 16),  # every token to the same experts, the others empty
    (7, 2, 3, list(range(7)), 8),  # held in the middle
    (7, 5, 2, [0, 1, 2, 3, 4], 8),  # nobody chose those held
    (256, 0, 256, [3, 100, 200, 255], 64),
    (3, 0, 3, [0, 1, 2], 64),
]


@pytest.mark.parametrize(("num_experts", "first", "held", "only", "tile"), LAYOUTS)
def test_layout(num_experts, first, held, only, tile):
    chosen, weights, slots = routed(num_experts, first, held, only, tile=tile)
    slots = type(slots)(*(np.asarray(field) for field in slots))
    padded, tiles_in_use = slots.token.shape[0], int(slots.num_tiles[0])
    assert padded == tile * slots.tile_expert.shape[0] == tile * max_tiles(R * K, held, tile)
    place = 0
    for expert in range(held):
        tokens, choices = np.nonzero(chosen == first + expert)
        count = -(-len(tokens) // tile)
        assert slots.expert_tiles[expert] == count
        if count:
            assert slots.first_tile[expert] == place
        assert (slots.tile_expert[place : place + count] == expert).all()
        mine = slice(place * tile, place * tile + len(tokens))
        padding = slice(mine.stop, (place + count) * tile)
        assert slots.token[mine].tolist() == tokens.tolist()
        np.testing.assert_array_equal(slots.weight[mine], weights[tokens, choices])
        assert slots.inverse[tokens, choices].tolist() == list(range(mine.start, mine.stop))
        assert not slots.weight[padding].any(), "padding weighs nothing"
        assert np.isin(slots.token[padding], tokens).all(), "padding repeats a token of its own group"
        place += count
    assert tiles_in_use == place
    assert not slots.weight[place * tile :].any()
    elsewhere = (chosen < first) | (chosen >= first + held)
    assert (slots.inverse[elsewhere] == padded).all()
    # What kernels read by index without looking is always there.
    assert ((slots.token >= 0) & (slots.token < R)).all()
    assert ((slots.tile_expert >= 0) & (slots.tile_expert < held)).all()


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("groups", [1, 2, 5, 33, 256])
@pytest.mark.parametrize("slots", [1, 64, 65, 1000])
def test_just_enough_tiles_for_the_worst_sizes(slots, groups, tile):
    # One slot in each of the groups in use but one, and the rest in that one.
    worst = max(used - 1 - (-(slots - used + 1) // tile) for used in range(1, min(slots, groups) + 1))
    assert max_tiles(slots, groups, tile) == worst


@pytest.mark.parametrize("weighted", [True, False])
def test_sum_of_choices(weighted):
    chosen, weights, slots = routed(7, 2, 3, list(range(7)), seed=1)
    rng = np.random.default_rng(2)
    table = rng.normal(size=(7, R, 5)).astype(np.float32)  # what an expert makes of a token
    expert = 2 + np.repeat(np.asarray(slots.tile_expert), 8)
    y = table[expert, np.asarray(slots.token)]
    y[np.asarray(slots.weight) == 0] = np.nan  # padding and unused tiles must not be read
    held = (chosen >= 2) & (chosen < 5)
    scale = (weights if weighted else np.ones_like(weights)) * held
    expected = np.einsum("rkd,rk->rd", table[chosen, np.arange(R)[:, None]], scale)
    actual = sum_choices(jnp.asarray(y), slots, jnp.asarray(weights) if weighted else None)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
