"""Lightning attention against its definition, token by token in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity
from jax.sharding import PartitionSpec as P

from jaxmoe.model.batch import Batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.lightning import LightningSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.parallel.sharding import partition_spec

SPEC = LightningSpec(num_heads=3, head_dim=8, norm=NormSpec(1e-2), depth=6)
WIDTH, LENGTH = 10, 75


def by_token(own, x, layer):
    """(T, D) → (T, D)."""
    heads, width = SPEC.num_heads, SPEC.head_dim
    qkv = x @ own["qkv_proj"].T
    qkv = (qkv / (1 + np.exp(-qkv))).reshape(LENGTH, heads, 3, width)
    state, out = np.zeros((heads, width, width)), np.zeros((LENGTH, heads * width))
    for head in range(heads):
        # arXiv 2501.08313, section 2.2: slopes of ALiBi, times 1 − l/(L − 1) in layer l of L, but for rounding.
        slope = 2.0 ** (-8 * (head + 1) / heads) * (1 - layer / (SPEC.depth - 1 + 1e-5) + 1e-5)
        for t in range(LENGTH):
            q, k, v = qkv[t, head]
            state[head] = np.exp(-slope) * state[head] + np.outer(k, v)
            out[t, head * width : (head + 1) * width] = q @ state[head]
    normal = own["norm"] * out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + SPEC.norm.eps)
    return (normal / (1 + np.exp(-x @ own["gate_proj"].T))) @ own["out_proj"].T


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_value(layer):
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape), SPEC.params(WIDTH)["lightning"])
    x = rng.standard_normal((LENGTH, WIDTH))
    segments = jnp.ones((1, LENGTH), jnp.int32)
    context = make_context((), Batch(None, jnp.arange(LENGTH)[None], segments), jnp.float32)
    context = dataclasses.replace(context, layer=jnp.int32(layer))
    got = SPEC.apply({"lightning": jax.tree.map(jnp.float32, own)}, jnp.float32(x)[None], context)
    parity.assert_close(got[0], by_token(own, x, layer), 1e-5, "outputs")


def test_the_last_layer_still_decays():
    """By what float32 would not tell from nothing."""
    last = SPEC.log_decays[-1]
    np.testing.assert_allclose(last, -(2.0 ** (-8 / 3 * np.arange(1, 4))) * (1e-5 + 1e-5 / 5), rtol=1e-4)


def test_shardings():
    """Heads stay whole, their query, key and value together."""
    declared = SPEC.params(WIDTH)["lightning"]
    assert {name: partition_spec(one) for name, one in declared.items()} == {
        "qkv_proj": P("tensor", "fsdp"),
        "gate_proj": P("tensor", "fsdp"),
        "norm": P(),
        "out_proj": P("fsdp", "tensor"),
    }
    assert {one.num_heads for name, one in declared.items() if name != "norm"} == {3}
