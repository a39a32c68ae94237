"""The fused cross-entropy, and targets' log-probabilities one by one, against their plain formulas."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.model.batch import IGNORED, next_token_targets
from jaxmoe.model.head import Head
from jaxmoe.parallel.sharding import BATCH_AXES, make_mesh
from jaxmoe.params import named
from jaxmoe.training import cross_entropy as module
from jaxmoe.training.cross_entropy import linear_cross_entropy

B, T, D, V = 3, 11, 5, 17


def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[0, 3:6] = IGNORED
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets)


def cross_entropy(hidden, weight, targets):
    return linear_cross_entropy(hidden, Head(weight), targets)


def plain(hidden, head, targets):
    logp = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    picked = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(targets == IGNORED, 0.0, picked))


@pytest.mark.parametrize("chunk", [1, 4, T, 3])
def test_cross_entropy_and_gradients(chunk, monkeypatch):
    monkeypatch.setattr(module, "_MOST_LOGITS", chunk * B * V)
    hidden, head, targets = inputs()
    np.testing.assert_allclose(cross_entropy(hidden, head, targets), plain(hidden, head, targets), rtol=1e-6)
    ours = jax.grad(lambda h, w: 3.0 * cross_entropy(h, w, targets), argnums=(0, 1))(hidden, head)
    want = jax.grad(lambda h, w: 3.0 * plain(h, w, targets), argnums=(0, 1))(hidden, head)
    for grad, expected in zip(ours, want, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(ours[0])[0, 3:6] == 0).all(), "ignored targets pull nothing"


def test_cross_entropy_never_holds_all_logits():
    rows, length, width, vocab = 4, 512, 8, 2**16

    def loss(hidden, head, targets):
        return cross_entropy(hidden, head, targets)

    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 4 * module._MOST_LOGITS
    assert 4 * rows * length * vocab >= 2 * 4 * module._MOST_LOGITS, "the case is too small to tell"


def mesh_of(*shape):
    return make_mesh(*shape)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2)])
@pytest.mark.parametrize("rows", [8, 3])
def test_cross_entropy_on_a_mesh(shape, rows, monkeypatch):
    monkeypatch.setattr(module, "_MOST_LOGITS", 200)  # several chunks on every mesh
    length, width, vocab = 11, 24, 40
    rng = np.random.default_rng(7)
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    # Logits of several hundred: exp overflows unless the maximum is that of all parts of the vocabulary.
    head = jnp.asarray(30 * rng.normal(size=(vocab, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(-1, vocab, (rows, length)), jnp.int32)

    def both(compute):
        def loss(h, w):
            return 3.0 * compute(h, w, targets)

        return jax.jit(loss)(hidden, head), *jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)

    value, value_too, (dhidden, dhead) = both(plain)
    with jax.set_mesh(mesh_of(*shape)):
        ours, ours_too, (our_dhidden, our_dhead) = both(cross_entropy)
    np.testing.assert_allclose([ours, ours_too], [value, value_too], rtol=1e-6)
    np.testing.assert_allclose(our_dhidden, dhidden, rtol=1e-5, atol=1e-5 * float(jnp.abs(dhidden).max()))
    np.testing.assert_allclose(our_dhead, dhead, rtol=1e-5, atol=1e-5 * float(jnp.abs(dhead).max()))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 2, 2)])
def test_the_head_travels_once_and_not_per_chunk(shape, monkeypatch):
    rows, length, width, vocab = 8, 32, 128, 512
    monkeypatch.setattr(module, "_MOST_LOGITS", 4 * vocab)
    mesh = mesh_of(*shape)

    def arg(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(jax.grad(cross_entropy, argnums=(0, 1)))
            .lower(
                arg((rows, length, width), jnp.bfloat16, BATCH_AXES),
                arg((vocab, width), jnp.float32, "tensor", "fsdp"),
                arg((rows, length), jnp.int32, BATCH_AXES),
            )
            .compile()
        )
    entry, loops = [], []
    inside = None
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            inside = entry if line.startswith("ENTRY") else loops
        found = re.search(r"= (.*?) (?:all-gather|reduce-scatter|all-reduce|all-to-all)(?:-start)?\(", line)
        if found:
            sizes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            inside.append(max(math.prod(map(int, size.split(","))) for size in sizes if size))
    assert "while(" in compiled.as_text(), "there are several chunks"
    part_of_head = vocab // shape[3] * width // shape[1]
    assert max(entry) >= part_of_head, "the head's gradient is reduced outside of the loop"
    assert max(loops, default=0) < part_of_head


def test_head_gradient_keeps_float32():
    hidden, head, targets = inputs()
    grads = jax.grad(cross_entropy, argnums=(0, 1))(hidden.astype(jnp.bfloat16), head, targets)
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)


def test_targets_stay_within_documents():
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 0]])
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0]])
    assert next_token_targets(tokens, segments).tolist() == [[6, IGNORED, 8, 9, IGNORED, IGNORED]]
    assert next_token_targets(tokens, None).tolist() == [[6, 7, 8, 9, 0, IGNORED]]


def plain_logprobs(hidden, weight, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, weight)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)
    return jnp.where(targets == IGNORED, 0.0, picked[..., 0])


def larger_inputs():
    """Of sizes that a mesh divides, but for the rows."""
    rng = np.random.default_rng(8)
    hidden, head = rng.normal(size=(3, 11, 24)), rng.normal(size=(40, 24))
    return *(jnp.asarray(x, jnp.float32) for x in (hidden, head)), jnp.asarray(
        rng.integers(-1, 40, (3, 11)), jnp.int32
    )


@pytest.mark.parametrize("shape", [None, (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8)])
def test_log_probabilities_of_targets_one_by_one(monkeypatch, shape):
    """Also when what is made of them weighs each token by its own probability, as preference losses do."""
    hidden, head, targets = larger_inputs()
    monkeypatch.setattr(module, "_MOST_LOGITS", 200)

    def loss(logprobs, hidden, weight):
        found = logprobs(hidden, weight, targets)
        return jnp.sum(jnp.sin(3 * found) * jnp.arange(found.size).reshape(found.shape)), found

    def ours(hidden, weight, targets):
        return module.target_logprobs(hidden, Head(weight), targets)

    def both(logprobs):
        return jax.jit(jax.value_and_grad(functools.partial(loss, logprobs), argnums=(0, 1), has_aux=True))

    want = both(plain_logprobs)(hidden, head)
    with contextlib.nullcontext() if shape is None else jax.set_mesh(mesh_of(*shape)):
        got = both(ours)(hidden, head)
    assert got[0][1].shape == targets.shape
    for (name, a), (_, b) in zip(named(got), named(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("shape", [None, (2, 2, 1, 2)])
def test_weights_of_targets(shape):
    hidden, head, targets = larger_inputs()
    weights = (
        jnp.asarray(np.random.default_rng(2).uniform(0, 2, targets.shape), jnp.float32).at[0, 1].set(0.0)
    )

    def ours(hidden, head):
        return linear_cross_entropy(hidden, Head(head), targets, weights)

    def plain(hidden, head):
        return -jnp.sum(weights * plain_logprobs(hidden, head, targets))

    want = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    with contextlib.nullcontext() if shape is None else jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, head)
    for (name, a), (_, b) in zip(named(got), named(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("function", ["linear_cross_entropy", "target_logprobs"])
def test_a_frozen_head_costs_no_gradient(function):
    """Products with the size of the head: logits and hidden's gradient, and one more only where the head learns."""
    hidden, head, targets = inputs()

    def products(argnums):
        def loss(hidden, head):
            return jnp.sum(getattr(module, function)(hidden, Head(head), targets))

        text = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(hidden, head))
        return text.count("dot_general")

    assert products((0, 1)) - products(0) == 1
