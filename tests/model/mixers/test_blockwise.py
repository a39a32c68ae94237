"""Block by block, with and without sinks and a selection of keys, against a softmax with one more column or without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.mixers.blockwise import blockwise_attention
from jaxmoe.model.mixers.selected_keys import packed_keys

B, T, N, M, H, W = 2, 19, 6, 3, 5, 4


def operands():
    random = np.random.default_rng(0)
    draw = lambda *sizes: jnp.asarray(random.standard_normal(sizes), jnp.float32)
    segments = np.ones((B, T), np.int32)
    segments[0, 8:], segments[1, 13:] = 2, 2
    return draw(B, T, N, H), draw(B, T, M, H), draw(B, T, M, W), jnp.asarray(segments), 2 * draw(N)


def selection():
    """Some keys of each query: each sees itself, and some none of its first block."""
    chosen = np.random.default_rng(1).random((B, T, T)) < 0.4
    chosen[:, 12:, :9] = False
    return jnp.asarray(chosen | np.eye(T, dtype=bool)[None])


def plain(q, k, v, segments, sinks, window, selected=None):
    k, v = (jnp.repeat(x, N // M, axis=2) for x in (k, v))
    scores = 0.7 * jnp.einsum("btnh,bsnh->bnts", q, k)
    age = jnp.arange(T)[None, None, :, None] - jnp.arange(T)[None, None, None, :]
    seen = (age >= 0) & (age < (window or T))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    if selected is not None:
        seen = seen & selected[:, None]
    column = jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))
    shares = jax.nn.softmax(jnp.concatenate([jnp.where(seen, scores, -1e30), column], axis=-1), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", shares[..., :-1], v)


@pytest.mark.parametrize("block", [1024, 16, 8])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("masked", "sunk", "chosen"),
    [(True, True, False), (False, True, True), (True, False, False), (False, False, True)],
)
def test_value_and_gradients(block, window, masked, sunk, chosen):
    q, k, v, segments, sinks = operands()
    segments, sinks = segments if masked else None, sinks if sunk else jnp.full((N,), -jnp.inf)
    selected = selection() if chosen else None

    def both(function):
        def loss(q, k, v, sinks):
            out = function(q, k, v, sinks)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    def blockwise(q, k, v, sinks):
        options = {"sinks": sinks if sunk else None, "scale": 0.7, "window": window, "block": block}
        bits = packed_keys(selected) if chosen else None
        return blockwise_attention(q, k, v, segments, selected_BTs=bits, **options)

    ours = both(blockwise)
    want = both(lambda q, k, v, sinks: plain(q, k, v, segments, sinks, window, selected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_memory_grows_with_the_length_and_not_its_square():
    length = 4096

    def loss(q, k, v, sinks):
        out = blockwise_attention(q, k, v, None, sinks=sinks, scale=1.0, window=None, block=128)
        return jnp.sum(out**2)

    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        .lower(*shapes, jax.ShapeDtypeStruct((4,), jnp.float32))
        .compile()
    )
    operands = sum(4 * length * heads * 8 for heads in (4, 2, 2))
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * operands
