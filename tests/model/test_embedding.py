"""The gradient of a lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.embedding import rows_of, sums_by_index
from jaxmoe.parallel.sharding import make_mesh


@pytest.mark.parametrize("rows", [1, 31, 32, 200, 1100])
@pytest.mark.parametrize("used", [1, 3, 40])
def test_sums_by_index(rows, used):
    """Some indices fill several blocks and blocks of these, some share one, the first and the last occur or do not."""
    rng = np.random.default_rng(rows + used)
    index = rng.integers(0, used, rows).astype(np.int32) + (3 if used < 40 else 0)
    values = rng.standard_normal((rows, 7)).astype(np.float32)
    want = np.zeros((43, 7))
    np.add.at(want, index, values.astype(np.float64))
    got = np.asarray(jax.jit(sums_by_index, static_argnums=2)(values, index, 43))
    np.testing.assert_allclose(got, want, atol=1e-4 if rows > 200 else 2e-5)
    assert not got[np.bincount(index, minlength=43) == 0].any()


def test_memory_grows_with_the_rows_alone():
    def largest(rows):
        shapes = [jax.ShapeDtypeStruct((rows, 2), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
        jaxpr = jax.make_jaxpr(lambda rows, index: sums_by_index(rows, index, 43))(*shapes)
        return max(out.aval.size for equation in jaxpr.eqns for out in equation.outvars)

    assert largest(2**16) == 16 * largest(2**12)


def test_gradient_needs_no_scatter_and_is_the_same_on_a_mesh():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((24, 8)).astype(np.float32)
    index = rng.integers(0, 24, (8, 5)).astype(np.int32)
    weights = rng.standard_normal((8, 5, 8)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda table, index: jnp.sum(rows_of(table, index) * weights)))
    want = np.zeros((24, 8))
    np.add.at(want, index, weights.astype(np.float64))
    np.testing.assert_allclose(gradient(table, index), want, atol=1e-5)
    assert " scatter(" not in gradient.lower(table, index).compile().as_text()
    for sizes in ({"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        with jax.set_mesh(make_mesh(**sizes)):
            sharded = jax.jit(jax.grad(lambda table, index: jnp.sum(rows_of(table, index) * weights)))
            np.testing.assert_allclose(sharded(table, index), want, atol=1e-5)
