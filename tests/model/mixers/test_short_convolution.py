"""The gated short convolution beside its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model.batch import make_batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.short_convolution import ShortConvolutionSpec

BATCH, LENGTH, WIDTH, CHANNELS, TAPS = 2, 20, 5, 7, 4
SEGMENTS = np.stack([np.repeat([1, 2, 3], [9, 1, 10]), np.repeat([1, 2, 0], [2, 15, 3])])


def test_the_layer_is_its_definition():
    spec = ShortConvolutionSpec(CHANNELS, TAPS)
    rng = np.random.default_rng(0)
    own = {
        name: rng.standard_normal(declared.shape)
        for name, declared in spec.params(WIDTH)["convolution"].items()
    }
    x = rng.standard_normal((BATCH, LENGTH, WIDTH))
    b, c, v = np.split(x @ own["in_proj"].T, 3, axis=-1)
    mixed = np.zeros_like(v)
    for row in range(BATCH):
        for at in range(LENGTH):
            for back in range(min(TAPS, at + 1)):
                if SEGMENTS[row, at - back] == SEGMENTS[row, at]:
                    mixed[row, at] += own["filters"][:, 0, TAPS - 1 - back] * (b * v)[row, at - back]
    want = (c * mixed) @ own["out_proj"].T
    batch = make_batch(jnp.zeros((BATCH, LENGTH), jnp.int32), None, jnp.asarray(SEGMENTS, jnp.int32))
    params = {"convolution": jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), own)}
    got = spec.apply(params, jnp.asarray(x, jnp.float32), make_context((), batch, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
