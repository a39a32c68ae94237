"""One place where a dense weight meets an activation: whatever it is made of, the caller cannot tell."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import drawn, parity

from jaxmoe.codecs import Fp8Blocks, four_bit, fp8_blocks
from jaxmoe.model import decoder
from jaxmoe.model.batch import learning_batch
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.linear import (
    LowRank,
    dense,
    linear,
    linear_gradients,
    lookup,
    part,
    row_lengths,
    unpacked,
)
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named
from jaxmoe.training.cross_entropy import linear_cross_entropy

OUT, IN, RANK = 12, 7, 3


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


def weights():
    """One of every kind, (12, 7)."""
    array = random(OUT, IN)
    pair = (random(RANK, IN, seed=1), random(OUT, RANK, seed=2))
    blocks = fp8_blocks.quantize(random(OUT, IN, seed=3), block=4, rows=5)
    return {
        "array": array,
        "low rank": LowRank(array, *pair, 0.7),
        "blocks": blocks,
        "low rank beside blocks": LowRank(blocks, *pair, 1.6),
        "rows of given lengths": LowRank(array, *pair, 0.7, magnitude=1 + jnp.abs(random(OUT, seed=7))),
    }


def meaning(weight):
    """The matrix in float64, by the definitions."""
    if isinstance(weight, LowRank):
        total = meaning(weight.base) + weight.scale * (np.float64(weight.b) @ np.float64(weight.a))
        if weight.magnitude is None:
            return total
        return np.float64(weight.magnitude)[:, None] * total / np.linalg.norm(total, axis=1, keepdims=True)
    if isinstance(weight, Fp8Blocks):
        codes = np.asarray(weight.codes).view(ml_dtypes.float8_e4m3fn)
        return np.float64(codes) * np.float64(weight.scales)[:, np.arange(codes.shape[-1]) // weight.block]
    return np.float64(weight)


@pytest.mark.parametrize("kind", weights())
def test_every_kind_means_one_matrix(kind):
    weight, x, bias = weights()[kind], random(2, 5, IN, seed=8), random(OUT, seed=9)
    want = meaning(weight)
    np.testing.assert_allclose(dense(weight, jnp.float32), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(x, weight, bias), np.float64(x) @ want.T + bias[None, None], atol=2e-5)
    index = jnp.asarray([[3, 0], [11, 3]])
    if kind in ("array", "low rank"):  # what an embedding can be
        np.testing.assert_allclose(lookup(weight, index, jnp.float32), want[np.asarray(index)], atol=1e-5)
    np.testing.assert_allclose(dense(unpacked(weight, jnp.float32), jnp.float32), want, rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), weight)
    np.testing.assert_allclose(linear(x, part(stacked, 1)), np.float64(x) @ want.T, atol=2e-5)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 128), (2, 8, 24), (2, 5, 24)], ids=["rows", "halves", "neither"])
def test_weights_within_one_quantised_tensor(shape, nested):
    """Of blocks that are a row's, a weight's, or go through both."""
    packed = four_bit.quantize(random(*shape), nested=nested)
    whole = four_bit.dequantize(packed, jnp.float32)
    pair = LowRank(packed, random(1, 3, shape[2]), random(2, shape[1], 3))
    for index in (0, 1):
        np.testing.assert_array_equal(dense(part(packed, index), jnp.float32), whole[index])
        one = part(pair, index)
        want = whole[index] + pair.b[index] @ pair.a[0]
        np.testing.assert_allclose(dense(one, jnp.float32), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["array", "low rank"])
def test_written_out_gradients_are_those_of_jax(kind):
    weight, x, dout = weights()[kind], random(2, 5, IN, seed=8), random(2, 5, OUT, seed=9)
    dx, dweight = linear_gradients(x, weight, dout, jax.tree.map(lambda w: jnp.zeros_like(w.T), weight))
    dweight = jax.tree.map(jnp.transpose, dweight)
    want_dx, want = jax.grad(lambda x, weight: jnp.sum(dout * linear(x, weight)), argnums=(0, 1))(x, weight)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(named(dweight), named(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dropped", [False, True])
def test_gains_near_1_in_bfloat16(dropped):
    """What training changes of lengths is less than a step of bfloat16: none of it is lost before the sum."""
    given = weights()["rows of given lengths"]
    bare = dataclasses.replace(given, magnitude=None)
    wide = lambda array: np.float64(jnp.asarray(array).astype(jnp.float32))
    lengths = jnp.asarray(np.linalg.norm(meaning(bare), axis=1) * 1.003, jnp.float32)
    arrays = {name: getattr(given, name).astype(jnp.bfloat16) for name in ("base", "a", "b")}
    weight = dataclasses.replace(given, magnitude=lengths, **arrays)
    if dropped:
        weight = dataclasses.replace(weight, dropout=Dropout(jax.random.key(0), 1e-9))
    x = random(50, IN, seed=8).astype(jnp.bfloat16)
    found = linear(x, weight, out_dtype=jnp.float32)
    total = wide(arrays["base"]) + given.scale * wide(arrays["b"]) @ wide(arrays["a"])
    gains = np.float64(lengths) / np.linalg.norm(total, axis=1)
    assert (np.abs(gains - 1) < 2**-7).all()
    want = wide(x) @ total.T * gains
    assert found.dtype == jnp.float32
    # The update's first product is in bfloat16; its errors are of no row's length alone.
    found, whole = np.float64(found), (want**2).sum(axis=0)
    np.testing.assert_allclose((found * want).sum(axis=0) / whole, 1, atol=1e-3)


def test_lengths_of_rows():
    """Of the sum, by expansion; zero where the pair takes away all of a row, and constants to gradients."""
    weight = weights()["low rank"]
    np.testing.assert_allclose(row_lengths(weight), np.linalg.norm(meaning(weight), axis=1), rtol=1e-5)
    base = -weight.scale * weight.b @ weight.a
    zero = LowRank(base, weight.a, weight.b, weight.scale, magnitude=jnp.ones(OUT))
    assert np.isfinite(row_lengths(zero)).all()
    x = random(5, IN, seed=8)
    assert np.isfinite(linear(x, zero)).all()
    given = weights()["rows of given lengths"]

    def detached(a, b, magnitude):
        total = given.base + given.scale * b @ a
        rows = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(total**2, axis=1)))
        return jnp.sum(jnp.sin(x @ ((magnitude / rows)[:, None] * total).T))

    def ours(a, b, magnitude):
        return jnp.sum(jnp.sin(linear(x, dataclasses.replace(given, a=a, b=b, magnitude=magnitude))))

    operands = (given.a, given.b, given.magnitude)
    for one, other in zip(
        jax.grad(ours, argnums=(0, 1, 2))(*operands),
        jax.grad(detached, argnums=(0, 1, 2))(*operands),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_sum_of_a_low_rank_weight_is_never_formed():
    weight, x = weights()["low rank"], random(2, 5, IN, seed=8)
    traced = jax.make_jaxpr(jax.grad(lambda weight: jnp.sum(linear(x, weight) ** 2), allow_int=True))(weight)
    shapes = [v.aval.shape for equation in traced.eqns for v in equation.outvars]
    assert shapes.count((OUT, IN)) == 1, "the base's own gradient, and nothing else of its shape"


model_of = functools.cache(functools.partial(drawn.model_of, seed=3))


def with_pairs(params, declared):
    """Every matrix with a low-rank pair beside it, but experts' gate and up share one a, as the kernels have it."""

    def paired(parameter, weight):
        if parameter.role not in ("matrix", "router", "embedding"):
            return weight
        *lead, out, width = weight.shape
        shared = [*lead[:-1], 1] if parameter.dims.endswith("EGFD") else lead
        return LowRank(
            weight, 0.3 * random(*shared, RANK, width, seed=5), 0.3 * random(*lead, out, RANK, seed=6), 0.5
        )

    return jax.tree.map(paired, declared, params)


def is_weight(leaf):
    return isinstance(leaf, LowRank | Fp8Blocks)


# Whole models take long to optimise. Here they never are; `test_decoder` has those of plain arrays optimised.
whole_model = functools.partial(
    jax.jit, static_argnames="spec", compiler_options={"xla_backend_optimization_level": 0}
)


@whole_model
def loss_and_gradients(params, batch, *, spec):
    def loss(params):
        hidden, stats = decoder.hidden_states(params, spec, batch, dtype=jnp.float32)
        head = decoder.output_head(params, spec)
        nll = linear_cross_entropy(hidden, head, batch.targets, batch.weights)
        return nll + stats.z.sum(), decoder.logits(params, spec, hidden)

    return jax.value_and_grad(loss, has_aux=True)(params)


def batch_for(spec):
    tokens = np.random.default_rng(4).integers(3, spec.vocab_size, (8, 11)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 7:] = 2
    positions = np.where(segments == 2, np.arange(11)[None] - 7, np.arange(11)[None]).astype(np.int32)
    return jax.tree.map(jnp.asarray, learning_batch(tokens, positions, segments))


@pytest.mark.parametrize(
    ("family", "on_mesh"),
    [("qwen3_moe", False), ("gpt_oss", True), ("gemma4_text", True)],
)
def test_a_model_of_low_rank_weights_is_that_of_their_sums(family, on_mesh):
    """Attention, dense and shared feed-forwards, router, experts, embedding and head, tied or not."""
    model = model_of(family)
    spec, batch = model.spec, batch_for(model.spec)
    params = with_pairs(model.pure_params(), spec.declared)
    sums = jax.tree.map(functools.partial(dense, dtype=jnp.float32), params, is_leaf=is_weight)
    (want, want_logits), want_grads = loss_and_gradients(sums, batch, spec=spec)
    if on_mesh:
        mesh = make_mesh(fsdp=2, expert=2, tensor=2)
        where = shardings(spec.declared, mesh)
        params = jax.tree.map(
            lambda place, weight: (
                dataclasses.replace(weight, base=jax.device_put(weight.base, place))
                if isinstance(weight, LowRank)
                else jax.device_put(weight, place)
            ),
            where,
            params,
        )
        with jax.set_mesh(mesh):
            (got, logits), grads = loss_and_gradients(params, batch, spec=spec)
    else:
        (got, logits), grads = loss_and_gradients(params, batch, spec=spec)
    parity.assert_close(logits, want_logits, 3e-5, "logits")
    parity.assert_close(got, want, 1e-5, "loss")
    for (name, weight), (_, sum_of), (_, gradient) in zip(
        named_weights(params), named_weights(want_grads), named_weights(grads), strict=True
    ):
        if not isinstance(weight, LowRank):
            continue
        # d sum = d base; dB = scale · d sum · Aᵀ; dA = scale · Bᵀ · d sum, over gate and up where they share it.
        parity.assert_close(gradient.base, sum_of, 2e-4, f"{name}, base")
        db = weight.scale * jnp.einsum("...oi,...ri->...or", sum_of, weight.a)
        da = weight.scale * jnp.einsum("...or,...oi->...ri", weight.b, sum_of)
        if weight.a.shape[:-2] != da.shape[:-2]:
            da = da.sum(-3, keepdims=True)
        parity.assert_close(gradient.b, db, 2e-4, f"{name}, b")
        parity.assert_close(gradient.a, da, 2e-4, f"{name}, a")


def named_weights(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def quantised(parameter, weight):
    """Codes and scales in blocks."""
    return fp8_blocks.quantize(weight, block=6, rows=8) if parameter.role == "matrix" else weight


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_model_of_quantised_weights_is_that_of_their_arrays(on_mesh):
    """And low-rank pairs beside them learn what they would beside the arrays."""
    model = model_of("qwen3_moe")
    spec, batch = model.spec, batch_for(model.spec)
    codes = jax.tree.map(quantised, spec.declared, model.pure_params())
    arrays = jax.tree.map(functools.partial(dense, dtype=jnp.float32), codes, is_leaf=is_weight)

    @whole_model
    def outcome(bases, pairs, batch, spec):
        def loss(pairs):
            params = jax.tree.map(
                lambda pair, base: (
                    dataclasses.replace(pair, base=base) if isinstance(pair, LowRank) else pair
                ),
                *(pairs, bases),
                is_leaf=is_weight,
            )
            hidden, _ = decoder.hidden_states(params, spec, batch, dtype=jnp.float32)
            nll = linear_cross_entropy(hidden, decoder.output_head(params, spec), batch.targets)
            return nll, decoder.logits(params, spec, hidden)

        return jax.value_and_grad(loss, has_aux=True)(pairs)

    pairs = jax.tree.map(
        lambda weight: (
            dataclasses.replace(weight, base=jnp.zeros(())) if isinstance(weight, LowRank) else weight
        ),
        with_pairs(model.pure_params(), spec.declared),
        is_leaf=is_weight,
    )
    (want, want_logits), want_grads = outcome(arrays, pairs, batch, spec=spec)
    with jax.set_mesh(make_mesh(fsdp=2, tensor=4)) if on_mesh else contextlib.nullcontext():
        (got, logits), grads = outcome(codes, pairs, batch, spec=spec)
    parity.assert_close(logits, want_logits, 1e-5, "logits")
    parity.assert_close(got, want, 1e-5, "loss")
    for (name, a), (_, b) in zip(named(grads), named(want_grads), strict=True):
        if not name.endswith("base"):
            parity.assert_close(a, b, 2e-4, name)
