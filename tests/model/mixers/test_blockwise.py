"""Block by block, with and without sinks, against a softmax with one more column or without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.mixers import blockwise as module
from jaxmoe.model.mixers.blockwise import blockwise_attention

B, T, N, M, H, W = 2, 19, 6, 3, 5, 4


def operands():
    random = np.random.default_rng(0)
    draw = lambda *sizes: jnp.asarray(random.standard_normal(sizes), jnp.float32)
    segments = np.ones((B, T), np.int32)
    segments[0, 8:], segments[1, 13:] = 2, 2
    mask = jnp.asarray(segments[:, None, :, None] == segments[:, None, None, :])
    return draw(B, T, N, H), draw(B, T, M, H), draw(B, T, M, W), mask, 2 * draw(N)


def plain(q, k, v, mask, sinks, window):
    k, v = (jnp.repeat(x, N // M, axis=2) for x in (k, v))
    scores = 0.7 * jnp.einsum("btnh,bsnh->bnts", q, k)
    age = jnp.arange(T)[None, None, :, None] - jnp.arange(T)[None, None, None, :]
    seen = (age >= 0) & (age < (window or T)) & (True if mask is None else mask)
    column = jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))
    shares = jax.nn.softmax(jnp.concatenate([jnp.where(seen, scores, -1e30), column], axis=-1), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", shares[..., :-1], v)


@pytest.mark.parametrize("block", [1024, 8, 1])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("masked", "sunk"), [(True, True), (False, True), (True, False)])
def test_value_and_gradients(block, window, masked, sunk, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES_PER_BLOCK", block)
    q, k, v, mask, sinks = operands()
    mask, sinks = mask if masked else None, sinks if sunk else jnp.full((N,), -jnp.inf)

    def both(function):
        def loss(q, k, v, sinks):
            out = function(q, k, v, sinks)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    def blockwise(q, k, v, sinks):
        return blockwise_attention(q, k, v, mask, sinks=sinks if sunk else None, scale=0.7, window=window)

    ours = both(blockwise)
    want = both(lambda q, k, v, sinks: plain(q, k, v, mask, sinks, window))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_only_the_scores_of_a_block_are_held(monkeypatch):
    monkeypatch.setattr(module, "_QUERIES_PER_BLOCK", 128)
    length = 4096

    def loss(q, k, v, sinks):
        return jnp.sum(blockwise_attention(q, k, v, None, sinks=sinks, scale=1.0, window=None) ** 2)

    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        .lower(*shapes, jax.ShapeDtypeStruct((4,), jnp.float32))
        .compile()
    )
    scores = 4 * 4 * length * length
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4
