"""The fused cross-entropy and the balance terms against their plain formulas."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.model.batch import IGNORED, next_token_targets
from jaxmoe.model.head import Head
from jaxmoe.parallel.sharding import BATCH_AXES, MESH_AXES
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
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", chunk * B * V)
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
    assert temporary < 4 * 4 * module._LOGITS_PER_CHUNK
    assert 4 * rows * length * vocab >= 2 * 4 * module._LOGITS_PER_CHUNK, "the case is too small to tell"


def mesh_of(*shape):
    return Mesh(np.array(jax.devices()).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2)])
@pytest.mark.parametrize("rows", [8, 3])
def test_cross_entropy_on_a_mesh(shape, rows, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 200)  # several chunks on every mesh
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
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 4 * vocab)
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
