"""What mixers with a state have in common: long rows in bfloat16, texts read in parts, documents of one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity

from jaxmoe.model.batch import Batch
from jaxmoe.model.mixers.channel_delta import ChannelDeltaSpec
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.gated_delta import GatedDeltaSpec
from jaxmoe.model.mixers.lightning import LightningSpec
from jaxmoe.model.norms import NormSpec

NORM = NormSpec(1e-3)
MIXERS = {
    "delta": GatedDeltaSpec(4, 2, 11, 13, 4, NORM),
    "delta by key head": GatedDeltaSpec(4, 2, 11, 13, 3, NORM, by_key_head=True),
    "channel delta": ChannelDeltaSpec(3, 14, 4, NormSpec(1e-3, "rms_float32")),
    "bounded channel delta": ChannelDeltaSpec(
        3, 14, 4, NormSpec(1e-3, "rms_float32"), narrow_gates=False, least_log=-5.0, float32=True
    ),
    "lightning": LightningSpec(4, 12, NORM, depth=5),
}
WIDTH = 24


def drawn(mixer):
    noise = np.random.default_rng(0)
    draw = lambda p: jnp.asarray((p.init == "ones") + 0.2 * noise.standard_normal(p.shape), jnp.float32)
    return jax.tree.map(draw, mixer.params(WIDTH))


def context_of(segments, dtype=jnp.float32, fresh=True):
    segments = jnp.asarray(segments, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    return make_context((), Batch(None, positions, segments), dtype, fresh=fresh)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_of_long_rows_are_finite_in_bfloat16(name):
    mixer, length = MIXERS[name], 8192
    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH), jnp.bfloat16)
    context = context_of((np.arange(length)[None] >= 5000) + 1, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(mixer))

    @jax.jit
    def gradients(params, x):
        loss = lambda params, x: jnp.sum(jnp.square(mixer.apply(params, x, context).astype(jnp.float32)))
        return jax.grad(loss, argnums=(0, 1))(params, x)

    for leaf in jax.tree.leaves(gradients(params, x)):
        assert jnp.isfinite(leaf).all()
        assert jnp.any(leaf != 0)


@pytest.mark.parametrize("name", MIXERS)
def test_a_text_read_in_parts(name):
    """Its first part with padding, of another length in each row; then several tokens, then one."""
    mixer = MIXERS[name]
    params, repeat = drawn(mixer), jnp.int32(1)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 90, WIDTH)), jnp.float32)
    want = np.asarray(mixer.apply(params, x, context_of(np.ones((2, 90)))))
    cache = mixer.init_cache(3, 2, 90, jnp.float32)
    read = np.zeros(2, int)
    for lengths, width in (((70, 67), 72), ((9, 11), 11), ((1, 1), 1), ((8, 9), 9)):
        rows = np.full((2, width, WIDTH), 7.0, np.float32)  # padding is not read, whatever it is
        for row, at in enumerate(read):
            rows[row, : lengths[row]] = x[row, at : at + lengths[row]]
        segments = np.arange(width)[None] < np.asarray(lengths)[:, None]
        context = context_of(segments, fresh=not read.any())
        got, cache = mixer.decode(params, jnp.asarray(rows), context, cache, repeat)
        for row, at in enumerate(read):
            expected = want[row, at : at + lengths[row]]
            parity.assert_close(got[row, : lengths[row]], expected, 2e-5, f"{lengths[row]} from {at} on")
        read += lengths
    assert not any(np.asarray(leaf)[[0, 2]].any() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("name", MIXERS)
def test_documents_of_one_row(name):
    mixer = MIXERS[name]
    params = drawn(mixer)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 80, WIDTH)), jnp.float32)
    together = mixer.apply(params, x, context_of(np.repeat([1, 2, 3, 0], [13, 51, 9, 7])[None]))
    for start, stop in ((0, 13), (13, 64), (64, 73)):
        alone = mixer.apply(params, x[:, start:stop], context_of(np.ones((1, stop - start))))
        parity.assert_close(together[:, start:stop], alone, 1e-5, f"{start} to {stop}")
