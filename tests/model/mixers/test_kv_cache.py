"""Attention to a cache beside attention to a text at hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.mixers.attend import attend
from jaxmoe.model.mixers.grouped_query import AttentionSpec
from jaxmoe.model.mixers.kv_cache import attend_to_cache
from jaxmoe.model.mixers.selected_keys import packed_keys

BATCH, HEADS, KV_HEADS, WIDTH, VALUES, LENGTH, REPEATS = 2, 6, 3, 10, 7, 110, 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("window", [None, 4])
def test_what_is_written_is_what_is_seen(window, dtype):
    """Bit for bit, with no more memory than the dtype takes."""
    spec = AttentionSpec(HEADS, KV_HEADS, WIDTH, None, value_dim=VALUES)
    k, v = (
        jnp.arange(BATCH * 5 * KV_HEADS * width).reshape(BATCH, 5, KV_HEADS, width).astype(dtype)
        for width in (WIDTH, VALUES)
    )
    cache, places = spec.init_cache(REPEATS, BATCH, 9, dtype), jnp.tile(jnp.arange(5)[None], (BATCH, 1))
    assert cache.k.dtype.itemsize == jnp.dtype(dtype).itemsize
    cache = cache.written(jnp.int32(3), places, k, v)
    keys, values, stand = cache.seen(jnp.int32(3), places[:, 4:], window, dtype)
    assert keys.dtype == values.dtype == dtype
    for row in range(BATCH):
        here = [place for place in stand[row].tolist() if place < 5]
        assert here == [0, 1, 2, 3, 4][-(window or 5) :]
        for got, want in ((keys, k), (values, v)):
            np.testing.assert_array_equal(got[row, :, : len(here)], np.moveaxis(want[row, here], 1, 0))


@pytest.mark.parametrize("queries", [1, 5, 73])
def test_queries_see_the_keys_that_are_selected_for_them(queries):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k = draw(BATCH, LENGTH, HEADS, WIDTH), draw(BATCH, LENGTH, KV_HEADS, WIDTH)
    v = draw(BATCH, LENGTH, KV_HEADS, VALUES)
    chosen = rng.random((BATCH, LENGTH, LENGTH)) < 0.3
    bits = packed_keys(jnp.asarray(chosen | np.eye(LENGTH, dtype=bool)[None]))
    want = attend(q, k, v, None, scale=0.3, selected_BTs=bits)
    places = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (BATCH, 1))
    k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    last = slice(LENGTH - queries, None)
    options = {"scale": 0.3, "selected_BTs": bits[:, last]}
    got = attend_to_cache(q[:, last], k, v, places[:, last], places, **options)
    np.testing.assert_allclose(got, want[:, last], rtol=1e-5, atol=1e-5)


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
    keys, values, stand = cache.seen(repeat, places, window, jnp.float32)
    assert keys.shape[2] == (LENGTH - 2 if window is None else min(LENGTH - 2, window + queries - 1))
    got = np.asarray(attend_to_cache(q[rows, places], keys, values, places, stand, **options))
    has_room = np.asarray(places) < LENGTH - 2
    np.testing.assert_allclose(got[has_room], want[rows, places][has_room], rtol=1e-5, atol=1e-5)
