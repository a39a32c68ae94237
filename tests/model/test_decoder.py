"""Properties of the decoder that need no oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn

from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.spec import LayerGroup
from jaxmoe.params import named

FAMILIES = ["mixtral", "qwen3_moe", "olmoe"]


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def hidden_states(params, batch, key=None, *, spec, dtype=jnp.float32):
    return decoder.hidden_states(params, spec, batch, dtype=dtype, key=key)


model_of = functools.partial(drawn.model_of, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family):
    model = model_of(family)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, model.spec.vocab_size, 23), rng.integers(0, model.spec.vocab_size, 14)
    rows = np.zeros((3, 40), int)
    rows[0, :23], rows[0, 23:37], rows[1, :23], rows[2, :14] = a, b, a, b
    segments = np.zeros((3, 40), int)
    segments[0, :23], segments[0, 23:37], segments[1, :23], segments[2, :14] = 1, 2, 1, 1
    together, alone_a, alone_b = np.asarray(model(rows, segment_ids=segments))
    np.testing.assert_allclose(together[:23], alone_a[:23], atol=2e-5)
    np.testing.assert_allclose(together[23:37], alone_b[:14], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_nothing_before_them(family):
    model = model_of(family)
    tokens = np.random.default_rng(1).integers(0, model.spec.vocab_size, (2, 19))
    changed = tokens.copy()
    changed[:, 11:] = (changed[:, 11:] + 5) % model.spec.vocab_size
    before, after = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_allclose(before[:, :11], after[:, :11], atol=1e-5)
    assert np.abs(before[:, 11:] - after[:, 11:]).max() > 1e-2


def test_remat_changes_nothing():
    model = model_of("qwen3_moe")
    batch = make_batch(jnp.asarray(np.random.default_rng(2).integers(0, model.spec.vocab_size, (2, 9))))

    def loss(params, remat):
        hidden, stats = decoder.hidden_states(params, model.spec, batch, dtype=jnp.float32, remat=remat)
        return jnp.sum(hidden * hidden[..., ::-1]) + stats.z.sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    kept, recomputed = (named(grad(model.pure_params(), remat)) for remat in (False, True))
    for (name, a), (_, b) in zip(kept, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max() + 1e-9), err_msg=name)


def test_router_statistics_are_in_layer_order():
    """With a pattern of two layers the scan's output is (repeats, …) per place; the log wants layer order."""
    model = model_of("mixtral", sliding_window=None, num_hidden_layers=4)
    (group,) = model.spec.groups
    assert group.repeats == 4
    two = dataclasses.replace(model.spec, groups=(LayerGroup(group.pattern * 2, 2),))
    params = model.pure_params()
    ((stacked,),) = params["groups"]
    halves = tuple(jax.tree.map(lambda x, place=place: x[place::2], stacked) for place in range(2))
    batch = make_batch(jnp.asarray(np.random.default_rng(3).integers(0, 104, (2, 17))))
    hidden, stats = hidden_states(params, batch, spec=model.spec)
    hidden2, stats2 = hidden_states(params | {"groups": (halves,)}, batch, spec=two)
    np.testing.assert_allclose(hidden, hidden2, atol=1e-5)
    np.testing.assert_array_equal(stats.load, stats2.load)
    assert len({tuple(row) for row in np.asarray(stats.load).tolist()}) == 4, (
        "layers must differ to tell their order"
    )
    assert np.asarray(stats.load).sum(-1).tolist() == [2 * 17 * 3] * 4


def test_jitter_needs_a_key_and_is_seeded():
    plain, noisy = model_of("mixtral"), model_of("mixtral", router_jitter_noise=0.3)
    assert isinstance(noisy.spec.layers[0].ffn, MoESpec)
    assert noisy.spec.layers[0].ffn.router.jitter == 0.3
    batch = make_batch(jnp.asarray(np.random.default_rng(4).integers(0, 104, (2, 9))))

    def run(model, key):
        return np.asarray(hidden_states(model.pure_params(), batch, key, spec=model.spec)[0])

    np.testing.assert_array_equal(run(noisy, None), run(plain, None))
    first, again, other = (
        run(noisy, jax.random.key(0)),
        run(noisy, jax.random.key(0)),
        run(noisy, jax.random.key(1)),
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - run(noisy, None)).max() > 1e-3


def test_bfloat16_is_close_to_float32():
    model = model_of("qwen3_moe", initializer_range=0.05)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 104, (2, 21)))
    batch = make_batch(tokens)
    wide, _ = hidden_states(model.pure_params(), batch, spec=model.spec)
    narrow, _ = hidden_states(model.pure_params(), batch, spec=model.spec, dtype=jnp.dtype("bfloat16"))
    assert narrow.dtype == jnp.bfloat16
    error = jnp.median(jnp.abs(wide - narrow.astype(jnp.float32)))
    assert 0 < float(error) < 0.02 * float(jnp.abs(wide).max())
