"""The chunked recurrence and its convolution beside one token after the other in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.mixers.convolution import causal_convolution
from jaxmoe.model.mixers.recurrence import recur, unit_inverse

BATCH, LENGTH, KEY_HEADS, HEADS, KEYS, VALUES = 2, 150, 2, 6, 5, 7
DOCUMENTS = np.stack(
    [
        np.repeat([0, 1, 2, 3, 4], [11, 1, 70, 46, 22]),
        np.repeat([0, 1, 2], [64, 63, 23]),
    ]
)
"""Borders within chunks of 64, at their ends, and two in one chunk."""


def operands(delta, decay):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    q, k = draw(BATCH, LENGTH, KEY_HEADS, KEYS), draw(BATCH, LENGTH, KEY_HEADS, KEYS)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, channels = draw(BATCH, LENGTH, HEADS, VALUES), (KEYS,) if "channels" in decay else ()
    log_decay = -0.3 * rng.random((BATCH, LENGTH, HEADS, *channels))
    if "strong" in decay:  # down to nothing in one token, beside others that hardly decay
        log_decay *= np.where(rng.random(log_decay.shape) < 0.2, 1000.0, 1.0)
    rate = rng.random((BATCH, LENGTH, HEADS)) if delta else None
    return q, k, v, log_decay, rate, draw(BATCH, HEADS, KEYS, VALUES)


def by_token(q, k, v, log_decay, rate, state, documents):
    """S_t = a S + k uᵀ, o = Sᵀ q, as it is written."""
    goes_on = np.ones((BATCH, LENGTH), bool)
    if documents is not None:
        goes_on[:, 1:] = documents[:, 1:] == documents[:, :-1]
    k, q = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, q))

    def step(state, token):
        query, key, value, log_decay, rate, goes_on = token
        kept = jnp.exp(log_decay if log_decay.ndim == 3 else log_decay[..., None])  # (B, N, H or 1)
        decayed = state * jnp.where(goes_on[:, None, None], kept, 0.0)[..., None]
        if rate is not None:
            value = rate[..., None] * (value - jnp.einsum("bnhv,bnh->bnv", decayed, key))
        state = decayed + key[..., :, None] * value[..., None, :]
        return state, jnp.einsum("bnhv,bnh->bnv", state, query)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, rate, jnp.asarray(goes_on)))
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize("decay", ["of heads", "strong of heads", "of channels", "strong of channels"])
def test_chunks_are_the_recurrence(decay, delta, documents):
    """What is read, the last state, and every gradient."""
    q, k, v, log_decay, rate, state = operands(delta, decay)
    rng = np.random.default_rng(1)
    d_out, d_state = rng.standard_normal(v.shape), rng.standard_normal(state.shape)

    def chunked(q, k, v, log_decay, rate, state):
        places = None if documents is None else jnp.asarray(documents, jnp.int32)
        return recur(q, k, v, log_decay, rate_BTN=rate, documents_BT=places, state_BNHV=state)

    def results(function, dtype):
        given = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, k, v, log_decay, rate, state))
        out, pullback = jax.vjp(function, *given)
        return out, pullback((jnp.asarray(d_out, dtype), jnp.asarray(d_state, dtype)))

    with jax.enable_x64(True):
        want = jax.tree.map(
            np.asarray, jax.jit(lambda: results(lambda *x: by_token(*x, documents), jnp.float64))()
        )
    got = jax.jit(lambda: results(chunked, jnp.float32))()
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("side", [1, 2, 16, 64])
def test_unit_inverse(side):
    """Of rows that are alike, for which a sum of powers would cancel."""
    lower = np.tril(0.9 + 0.1 * np.random.default_rng(0).random((3, side, side)), -1)
    got = unit_inverse(jnp.asarray(lower, jnp.float32))
    want = np.linalg.inv(np.eye(side)[None] + lower)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_convolution_stays_in_its_document():
    rng = np.random.default_rng(0)
    x, filters, bias = rng.standard_normal((BATCH, LENGTH, 9)), rng.standard_normal((9, 4)), rng.random(9)
    got = causal_convolution(
        *(jnp.asarray(each, jnp.float32) for each in (x, filters, bias)), jnp.asarray(DOCUMENTS, jnp.int32)
    )
    want = np.tile(bias, (BATCH, LENGTH, 1))
    for row in range(BATCH):
        for at in range(LENGTH):
            for back in range(min(4, at + 1)):
                if DOCUMENTS[row, at - back] == DOCUMENTS[row, at]:
                    want[row, at] += filters[:, 3 - back] * x[row, at - back]
    np.testing.assert_allclose(got, want / (1 + np.exp(-want)), atol=1e-5)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_gradients_of_the_convolution(documents, silu):
    """Of inputs, filters, bias and what comes before, beside those of a sum over shifted inputs in float64."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    operands = draw(BATCH, LENGTH, 9), draw(9, 4), draw(9), draw(BATCH, 3, 9)
    d_out = draw(BATCH, LENGTH, 9)
    places = np.zeros((BATCH, LENGTH), int) if documents is None else documents
    extended_places = np.concatenate([np.repeat(places[:, :1], 3, axis=1), places], axis=1)

    def shifted(x, filters, bias, tail):
        extended = jnp.concatenate([tail, x], axis=1)
        own = [(extended_places[:, tap : tap + LENGTH] == places)[..., None] for tap in range(4)]
        inputs = [jnp.where(own[tap], extended[:, tap : tap + LENGTH], 0) for tap in range(4)]
        total = bias[None, None] + sum(filters[:, tap][None, None] * inputs[tap] for tap in range(4))
        return jax.nn.silu(total) if silu else total

    def ours(x, filters, bias, tail):
        given = None if documents is None else jnp.asarray(documents, jnp.int32)
        return causal_convolution(x, filters, bias, given, tail, silu=silu)

    def results(function, dtype):
        out, pullback = jax.vjp(function, *(jnp.asarray(x, dtype) for x in operands))
        return out, pullback(jnp.asarray(d_out, dtype))

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, results(shifted, jnp.float64))
    for mine, theirs in zip(jax.tree.leaves(results(ours, jnp.float32)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
