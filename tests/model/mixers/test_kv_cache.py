"""Attention to a cache beside attention to a text at hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.kv_cache import attend_to_cache

BATCH, HEADS, KV_HEADS, WIDTH, VALUES, LENGTH, REPEATS = 2, 6, 3, 10, 7, 110, 4


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 13])
@pytest.mark.parametrize("queries", [1, 5, 73])
def test_queries_see_what_they_see_in_a_whole_text(queries, window, sinks):
    """Rows that go on from different places, one of them past the end of the cache."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k = draw(BATCH, LENGTH, HEADS, WIDTH), draw(BATCH, LENGTH, KV_HEADS, WIDTH)
    v = draw(BATCH, LENGTH, KV_HEADS, VALUES)
    options = {"scale": 0.3, "window": window, "sinks": draw(HEADS) if sinks else None}
    want = np.asarray(attend(q, k, v, None, **options))

    starts = np.asarray([31, LENGTH - queries])
    spec = AttentionSpec(HEADS, KV_HEADS, WIDTH, None, value_dim=VALUES, window=window)
    repeat, first = jnp.int32(2), jnp.arange(LENGTH, dtype=jnp.int32)[None].repeat(BATCH, axis=0)
    # Void from the first query on; the last two positions have no room.
    cache = spec.init_cache(REPEATS, BATCH, LENGTH - 2, jnp.float32)
    assert cache.k.shape == (REPEATS, BATCH, KV_HEADS, LENGTH - 2, WIDTH)
    known = first < starts[:, None]
    cache = cache.written(repeat, first, *(jnp.where(known[:, :, None, None], x, 1e3) for x in (k, v)))

    places = jnp.asarray(starts[:, None] + np.arange(queries)[None], jnp.int32)
    rows = np.arange(BATCH)[:, None]
    cache = cache.written(repeat, places, k[rows, places], v[rows, places])
    assert not np.asarray(cache.k)[[0, 1, 3]].any()
    keys, values, stand = cache.seen(repeat, places, window)
    assert keys.shape[2] == (LENGTH - 2 if window is None else min(LENGTH - 2, window + queries - 1))
    got = np.asarray(attend_to_cache(q[rows, places], keys, values, places, stand, **options))
    has_room = np.asarray(places) < LENGTH - 2
    np.testing.assert_allclose(got[has_room], want[rows, places][has_room], rtol=1e-5, atol=1e-5)
