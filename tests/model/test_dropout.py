"""Dropout of what enters a low-rank pair: against an explicit mask, and which numbers share one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import drawn

from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.feed_forward.moe import MoESpec
from jaxmoe.model.linear import LowRank, linear, lookup, part
from jaxmoe.parallel.experts import experts_on_mesh
from jaxmoe.parallel.sharding import make_mesh

OUT, IN, RANK = 12, 7, 3
DROPOUT = Dropout(jax.random.key(5), 0.3)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


def pair(*lead):
    return LowRank(random(*lead, OUT, IN), random(*lead, RANK, IN), random(*lead, OUT, RANK), 0.7, DROPOUT)


def test_gradients_are_those_of_an_explicit_mask():
    weight, x, dout = pair(), random(2, 5, IN), random(2, 5, OUT)
    mask = (jax.random.uniform(DROPOUT.key, x.shape) >= 0.3) / np.float32(0.7)
    assert 0 < np.mean(mask == 0) < 0.6

    def ours(x, a, b):
        return jnp.sum(dout * linear(x, dataclasses.replace(weight, a=a, b=b)))

    def explicit(x, a, b):
        return jnp.sum(dout * (x @ weight.base.T + 0.7 * ((x * mask) @ a.T) @ b.T))

    operands = (x, weight.a, weight.b)
    for one, other in zip(
        jax.grad(ours, argnums=(0, 1, 2))(*operands),
        jax.grad(explicit, argnums=(0, 1, 2))(*operands),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_parts_of_a_parameter_have_masks_of_their_own():
    halves = [part(pair(2), index) for index in range(2)]
    ones = jnp.ones((3, IN))
    assert not np.array_equal(*(half.dropout(ones) for half in halves))
    assert [half.shape for half in halves] == [(OUT, IN)] * 2


def test_tokens_that_are_looked_up_lose_nothing():
    weight, index = pair(), jnp.asarray([3, 0])
    plain = dataclasses.replace(weight, dropout=None)
    np.testing.assert_array_equal(*(lookup(one, index, jnp.float32) for one in (weight, plain)))


@functools.cache
def adapted_model():
    """A tiny model with a pair on every matrix of its layers."""
    model = drawn.model_of("qwen3_moe", seed=3)

    def paired(declared, weight):
        if declared.role not in ("matrix", "router"):
            return weight
        *lead, out, width = weight.shape
        shared = [*lead[:-1], 1] if declared.dims.endswith("EGFD") else lead
        return LowRank(weight, 0.3 * random(*shared, RANK, width), 0.3 * random(*lead, out, RANK), 0.5)

    return model.spec, jax.tree.map(paired, model.spec.declared, model.pure_params())


def hidden_states(key, rate, remat=False):
    spec, params = adapted_model()
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9))

    @jax.jit
    def run(params):
        options = {"dtype": jnp.float32, "key": key, "dropout": rate, "remat": remat}
        return decoder.hidden_states(params, spec, make_batch(jnp.asarray(tokens)), **options)[0]

    return run(params)


def test_only_a_key_drops_anything():
    key = jax.random.key(0)
    plain = hidden_states(None, 0.0)
    np.testing.assert_array_equal(hidden_states(None, 0.3), plain)
    np.testing.assert_array_equal(hidden_states(key, 0.0), plain)
    dropped = hidden_states(key, 0.3)
    assert np.abs(dropped - plain).max() > 0.01
    np.testing.assert_allclose(hidden_states(key, 0.3, True), dropped, atol=1e-5)
    assert np.abs(hidden_states(jax.random.key(1), 0.3) - dropped).max() > 0.01


def test_every_layer_and_parameter_has_a_key_of_its_own(monkeypatch):
    """Attention has four pairs; a dense feed-forward three and a sparse one its router's, beside the experts'."""
    seen = []
    plain = Dropout.__call__

    def noted(self, x):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(self.key))
        return plain(self, x)

    monkeypatch.setattr(Dropout, "__call__", noted)
    hidden_states(jax.random.key(0), 0.25).block_until_ready()
    jax.effects_barrier()
    layers = adapted_model()[0].layers
    expected = sum(4 + (1 if isinstance(layer.ffn, MoESpec) else 3) for layer in layers)
    assert len(seen) == len(set(seen)) == expected


def test_experts_on_a_mesh_drop_of_every_slot_its_own():
    """In the mean over keys what is dropped is nothing; on every device another mask."""
    experts, width, hidden = 8, 16, 12
    own = {
        "gate_up": LowRank(
            jnp.zeros((experts, 2, hidden, width)),
            random(experts, 1, RANK, width),
            random(experts, 2, hidden, RANK),
            0.5,
        ),
        "down": LowRank(
            jnp.zeros((experts, width, hidden)),
            random(experts, RANK, hidden),
            random(experts, width, RANK),
            0.5,
        ),
    }
    x = jnp.broadcast_to(random(1, width), (16, width))
    chosen, weights = jnp.broadcast_to(jnp.asarray([[1, 6]]), (16, 2)), jnp.ones((16, 2))

    @jax.jit
    def run(key):
        dropped = {
            name: dataclasses.replace(one, dropout=Dropout(jax.random.fold_in(key, n), 0.3))
            for n, (name, one) in enumerate(own.items())
        }
        return experts_on_mesh(dropped, adapted_model()[0].layers[0].ffn.activation, x, chosen, weights)

    with jax.set_mesh(make_mesh(data=2, expert=2, tensor=2)):
        rows = np.asarray(run(jax.random.key(0)))
        again = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(rows, again)
    assert np.unique(rows, axis=0).shape[0] == 16
