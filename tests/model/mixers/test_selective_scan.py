"""The selective scan by chunks beside one token after the other in float64, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.batch import make_batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.mamba1 import Mamba1Spec
from jaxmoe.model.mixers.selective_scan import selective_scan
from jaxmoe.model.norms import NormSpec
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named

BATCH, LENGTH, CHANNELS, STATE = 2, 150, 7, 5
DOCUMENTS = np.stack(
    [
        np.repeat([0, 1, 2, 3, 4], [11, 1, 70, 46, 22]),
        np.repeat([0, 1, 2], [64, 63, 23]),
    ]
)
"""Borders within chunks of 64, at their ends, and two in one chunk."""


def operands():
    rng = np.random.default_rng(0)
    x, keys, queries = (rng.standard_normal((BATCH, LENGTH, size)) for size in (CHANNELS, STATE, STATE))
    steps, rates = rng.random((BATCH, LENGTH, CHANNELS)), 3 * rng.random((CHANNELS, STATE))
    return x, steps, keys, queries, rates, rng.standard_normal((BATCH, CHANNELS, STATE))


def by_token(x, steps, keys, queries, rates, state, documents):
    goes_on = np.ones((BATCH, LENGTH), bool)
    if documents is not None:
        goes_on[:, 1:] = documents[:, 1:] == documents[:, :-1]

    def step(state, token):
        x, step, key, query, goes_on = token
        kept = jnp.exp(-rates[None] * step[..., None]) * goes_on[:, None, None]
        state = kept * state + (step * x)[..., None] * key[:, None]
        return state, jnp.einsum("bxy,by->bx", state, query)

    tokens = jax.tree.map(
        lambda each: jnp.moveaxis(each, 1, 0), (x, steps, keys, queries, jnp.asarray(goes_on))
    )
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_chunks_are_the_recurrence(documents):
    """What is read, the last state, and every gradient."""
    rng = np.random.default_rng(1)
    given = operands()
    d_out, d_state = rng.standard_normal(given[0].shape), rng.standard_normal(given[-1].shape)

    def chunked(*given):
        places = None if documents is None else jnp.asarray(documents, jnp.int32)
        return selective_scan(*given[:-1], documents_BT=places, state_BXY=given[-1])

    def results(function, dtype):
        out, pullback = jax.vjp(function, *(jnp.asarray(each, dtype) for each in given))
        return out, pullback((jnp.asarray(d_out, dtype), jnp.asarray(d_state, dtype)))

    with jax.enable_x64(True):
        want = jax.tree.map(
            np.asarray, jax.jit(lambda: results(lambda *x: by_token(*x, documents), jnp.float64))()
        )
    got = jax.jit(lambda: results(chunked, jnp.float32))()
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


def test_states_of_tokens_are_not_kept():
    """Memory of the gradient grows with a token's operands, a few channels each, and not with its state."""
    channels, state = 64, 16

    def memory(length):
        wide, narrow = jnp.zeros((1, length, channels)), jnp.zeros((1, length, state))
        loss = lambda *given: jnp.sum(selective_scan(*given)[0] ** 2)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        compiled = gradient.lower(wide, wide, narrow, narrow, jnp.ones((channels, state))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_token = (memory(8192) - memory(4096)) / 4096
    assert per_token < 4 * channels * state, f"{per_token:.0f} bytes for each token"


def test_a_mesh_changes_nothing():
    """Of the layer, its gradients included, with its channels on several devices."""
    spec, width = Mamba1Spec(24, STATE, 6, 4, NormSpec(1e-2)), 8
    rng = np.random.default_rng(0)
    declared = spec.params(width)
    params = jax.tree.map(
        lambda p: jnp.asarray((p.init == "ones") + 0.2 * rng.standard_normal(p.shape), jnp.float32), declared
    )
    x, cotangent = jnp.asarray(rng.standard_normal((2, 8, 70, width)), jnp.float32)
    segments = jnp.asarray(np.tile(np.repeat([1, 2, 3], [30, 36, 4]), (8, 1)), jnp.int32)
    context = make_context((), make_batch(jnp.zeros_like(segments), None, segments), jnp.float32)

    @jax.jit
    def results(params):
        out, pullback = jax.vjp(lambda params: spec.apply(params, x, context), params)
        return out, pullback(cotangent)

    alone, mesh = results(params), make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        together = results(jax.device_put(params, shardings(declared, mesh)))
    for (name, ours), (_, want) in zip(named(together), named(alone), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max(), rtol=0, err_msg=name)
