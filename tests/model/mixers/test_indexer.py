"""The keys that an indexer selects: exactly the best, of the query's document, in memory that grows with the text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxmoe.model.batch import Batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.indexer import IndexerSpec, IndexVectors, Places, divergences, select_keys
from jaxmoe.model.mixers.latent import LatentAttentionSpec
from jaxmoe.model.mixers.query_blocks import QUERIES
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.mixers.selected_keys import IndexerStats, Selection, highest, unpacked_keys
from jaxmoe.model.norms import NormSpec
from jaxmoe.parallel.sharding import make_mesh, spec_of
from jaxmoe.params import named

ROPE = RopeSpec(1e4, 8, interleaved=True)
INDEXER = IndexerSpec(16, 18, RopeSpec(1e4, 8))
SPEC = LatentAttentionSpec(2, 12, 8, 13, 20, 22, ROPE, NormSpec(1e-6), top_k=32, indexer=INDEXER)
WIDTH = 24


def naive_selection(q_BTNH, weights_BTN, k_BSH, places_BT, documents_BT, count):
    """Every query by itself, in float64: (B, T, S) bool."""
    q_BTNH, weights_BTN, k_BSH = (np.asarray(x, np.float64) for x in (q_BTNH, weights_BTN, k_BSH))
    chosen = np.zeros((*q_BTNH.shape[:2], k_BSH.shape[1]), bool)
    for row, query in np.ndindex(*chosen.shape[:2]):
        scores_S = weights_BTN[row, query] @ np.maximum(q_BTNH[row, query] @ k_BSH[row].T, 0)
        visible = np.arange(k_BSH.shape[1]) <= places_BT[row, query]
        if documents_BT is not None:
            visible &= documents_BT[row] == documents_BT[row, query]
        best = sorted(np.flatnonzero(visible), key=lambda key: -scores_S[key])
        chosen[row, query, best[:count]] = True
    return chosen


def operands(batch, queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, queries, 16, 18), (batch, queries, 16), (batch, keys, 18)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("length", [20, QUERIES, QUERIES + 1, 3 * QUERIES - 7])
@pytest.mark.parametrize("packed", [False, True])
def test_the_selection_is_exact(length, packed):
    """Also in blocks of queries that do not divide the text, and where a document has fewer keys than are chosen."""
    places = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    documents = None
    if packed:
        documents = np.ones((2, length), np.int32)
        documents[0, 7:], documents[0, 15:], documents[1, length // 2 :] = 2, 3, 2
        documents = jnp.asarray(documents)
    given = operands(2, length, length)
    packed_keys = select_keys(IndexVectors(*given), Places(places, documents), 11)
    found = np.asarray(unpacked_keys(packed_keys))
    assert packed_keys.shape == (2, length, -(-length // 8))
    assert not found[..., length:].any()
    np.testing.assert_array_equal(found[..., :length], naive_selection(*given, places, documents, 11))


def test_queries_that_follow_on_others():
    """Of a text in a cache: their places are not those of the first keys."""
    places = jnp.asarray([[40, 41, 42], [12, 13, 14]], jnp.int32)
    given = operands(2, 3, 50)
    found = np.asarray(unpacked_keys(select_keys(IndexVectors(*given), Places(places), 11)))[..., :50]
    np.testing.assert_array_equal(found, naive_selection(*given, places, None, 11))


def test_of_equal_scores_the_first_keys():
    scores = jnp.asarray([[[0.0, 2.0, 0.0, 0.0, -1.0, 0.0]]])
    visible = jnp.asarray([[[True, True, False, True, True, True]]])
    assert highest(scores, visible, 3).tolist() == [[[True, True, False, True, False, False]]]


def drawn(spec=SPEC, dtype=jnp.float32):
    noise = np.random.default_rng(0)
    draw = lambda p: jnp.asarray((p.init == "ones") + 0.2 * noise.standard_normal(p.shape), dtype)
    return jax.tree.map(draw, spec.params(WIDTH))


def context_of(length, dtype=jnp.float32, segments=None):
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    segments = jnp.ones((1, length), jnp.int32) if segments is None else segments
    return make_context(SPEC.rotations(), Batch(None, positions, segments), dtype)


def applied(spec, params, x, context):
    selection, _ = spec.select(params, x, context, None)
    return spec.apply(params, x, dataclasses.replace(context, selection=selection))


def test_a_short_text_sees_all_keys():
    """What no choice is made of is attention without an indexer, to the bit."""
    x, context = jax.random.normal(jax.random.key(0), (1, 32, WIDTH)), context_of(32)
    whole = dataclasses.replace(SPEC, top_k=None, indexer=None)
    assert SPEC.select(drawn(), x, context, None) == (Selection(), None)
    np.testing.assert_array_equal(applied(SPEC, drawn(), x, context), whole.apply(drawn(), x, context))


def test_a_layer_that_sees_all_keys_passes_a_selection_on():
    whole = dataclasses.replace(SPEC, top_k=None, indexer=None)
    x = jax.random.normal(jax.random.key(0), (1, 50, WIDTH))
    plain, selection = context_of(50), Selection(jnp.zeros((1, 50, 7), jnp.uint8))
    chosen = dataclasses.replace(plain, selection=selection)
    assert whole.select(drawn(), x, chosen, None)[0] is selection
    np.testing.assert_array_equal(whole.apply(drawn(), x, chosen), whole.apply(drawn(), x, plain))


def test_gradients_of_long_rows_are_finite_in_bfloat16():
    length = 8192
    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH), jnp.bfloat16)
    segments = (jnp.arange(length)[None] >= 5000) + 1
    context, params = context_of(length, jnp.bfloat16, segments), drawn(dtype=jnp.bfloat16)

    @jax.jit
    def gradients(params, x):
        loss = lambda params, x: jnp.sum(jnp.square(applied(SPEC, params, x, context).astype(jnp.float32)))
        return jax.grad(loss, argnums=(0, 1))(params, x)

    for name, leaf in named(gradients(params, x)):
        assert jnp.isfinite(leaf).all(), name
        assert jnp.any(leaf != 0) == ("indexer" not in name), name


@pytest.mark.parametrize("asked", [False, True])
def test_memory_grows_with_the_text(asked):
    """Of twice as many tokens about twice as much: no score of every query and every key is there at once."""

    def peak(length):
        context = context_of(length)

        def loss(params, x):
            out = jnp.sum(jnp.square(applied(SPEC, params, x, context)))
            return out + divergence_of(params, x, context).divergence if asked else out

        x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(drawn(), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = peak(4096), peak(8192)
    assert long < 2.3 * short
    assert long < 8192 * 8192 * 2


def naive_divergences(index, places, chosen_BTS, q_BTNH, k_BTNH, scale):
    """Every query by itself, in float64."""
    index, q_BTNH, k_BTNH = jax.tree.map(lambda x: np.asarray(x, np.float64), (index, q_BTNH, k_BTNH))
    found = np.zeros(places.shape)
    for row, query in np.ndindex(*places.shape):
        keys = np.flatnonzero(chosen_BTS[row, query])
        scores_NS = scale * np.einsum("nh,snh->ns", q_BTNH[row, query], k_BTNH[row, keys])
        p_S = softmax(scores_NS).mean(axis=0)
        own_S = index.weights_BTN[row, query] @ np.maximum(
            index.q_BTNH[row, query] @ index.k_BSH[row, keys].T, 0
        )
        found[row, query] = np.sum(p_S * (np.log(p_S) - np.log(softmax(own_S))))
    return found


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("length", "count"), [(QUERIES + 9, 11), (QUERIES + 9, None), (20, 11)])
def test_how_far_attention_is_from_an_indexer(length, count):
    places = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    documents = jnp.asarray(np.arange(length)[None] >= np.asarray([[7], [length // 2]]), jnp.int32)
    index, rng = IndexVectors(*operands(2, length, length)), np.random.default_rng(3)
    q, k = (jnp.asarray(rng.standard_normal((2, length, 3, 5)), jnp.float32) for _ in range(2))
    keys = None if count is None else select_keys(index, Places(places, documents), count)
    chosen = naive_selection(*index, places, documents, count or length)
    want = naive_divergences(index, places, chosen, q, k, 0.7)
    got = divergences(index, Places(places, documents), keys, q, k, 0.7)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    assert want.mean() > 0.5


def divergence_of(params, x, context):
    stats = IndexerStats(jnp.zeros(()), jnp.zeros(()))
    asked = dataclasses.replace(context, selection=Selection(stats=stats))
    return SPEC.select(params, x, asked, None)[0].stats


@pytest.mark.parametrize("length", [50, 20])
def test_its_loss_reaches_the_indexer_alone(length):
    """Also where a query sees all keys."""
    x, context = jax.random.normal(jax.random.key(0), (1, length, WIDTH)), context_of(length)
    loss = lambda params, x: divergence_of(params, x, context).divergence
    for name, grad in named(jax.jit(jax.grad(loss, argnums=(0, 1)))(drawn(), x)):
        assert np.asarray(grad).any() == name.startswith("0.indexer."), name


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "k_norm", "k_norm_bias", "head_weights"])
def test_the_gradient_of_its_loss(name):
    """That of a step along it, where no choice is made that it could change."""
    length = 20
    params, context, x = drawn(), context_of(length), jax.random.normal(jax.random.key(0), (1, length, WIDTH))

    @jax.jit
    def loss(value):
        indexer = params["indexer"] | {name: value}
        return divergence_of(params | {"indexer": indexer}, x, context).divergence

    value = params["indexer"][name]
    grad = jax.grad(loss)(value)
    size = jnp.linalg.norm(grad)
    step = 0.01 * grad / size
    np.testing.assert_allclose((loss(value + step) - loss(value - step)) / 0.02, size, rtol=1e-2)


def test_padding_has_no_loss():
    x, valid = jax.random.normal(jax.random.key(0), (1, 50, WIDTH)), jnp.arange(50)[None] < 40
    padded = divergence_of(drawn(), x, context_of(50, segments=valid.astype(jnp.int32)))
    alone = divergence_of(drawn(), x[:, :40], context_of(40))
    assert padded.tokens == alone.tokens == 40
    np.testing.assert_allclose(padded.divergence, alone.divergence, rtol=1e-5)


def test_devices_choose_for_their_own_rows():
    """Left alone XLA would have each of them choose for all."""
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    places = jnp.tile(jnp.arange(70, dtype=jnp.int32), (4, 1))
    given = IndexVectors(*operands(4, 70, 70)), Places(places, places // 30)
    select = jax.jit(lambda *given: select_keys(*given, 11))
    want = select(*given)
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, NamedSharding(mesh, spec_of("B")))
        compiled = jax.jit(lambda *given: select_keys(*given, 11)).lower(*placed).compile()
        assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", compiled.as_text())
        np.testing.assert_array_equal(compiled(*placed), want)
