import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.optim import orthogonalize

BANDS = {"you_jiacheng": (0.97, 1.04), "jordan": (0.67, 1.14), "polar_express": (0.85, 1.15)}


def matrix(rng, out, in_, singular_values):
    """A random (out, in) matrix with the given singular values, in float64."""
    u, _ = np.linalg.qr(rng.standard_normal((out, len(singular_values))))
    v, _ = np.linalg.qr(rng.standard_normal((in_, len(singular_values))))
    return u * singular_values @ v.T


def dots(x, **options):
    """The products of a step; all steps are one loop."""
    jaxpr = jax.make_jaxpr(lambda x: orthogonalize(x, **options))(x)
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    found = [
        equation for equation in loop.params["jaxpr"].jaxpr.eqns if equation.primitive.name == "dot_general"
    ]
    assert len(found) == 3
    return found


@pytest.mark.parametrize("coefficients", BANDS)
@pytest.mark.parametrize(("out", "in_"), [(12, 40), (40, 12), (24, 24)])
def test_singular_values_end_in_the_band_and_vectors_stay(coefficients, out, in_):
    rng = np.random.default_rng(0)
    values = np.geomspace(1.0, 0.03, min(out, in_))
    x = matrix(rng, out, in_, 7.0 * values)
    y = np.asarray(orthogonalize(jnp.asarray(x, jnp.float32), coefficients), np.float64)
    found = np.linalg.svd(y, compute_uv=False)
    low, high = BANDS[coefficients]
    assert found.min() > low
    assert found.max() < high
    # U Sᵀ V of x turns y into a diagonal: the singular vectors are untouched.
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    rotated = u.T @ y @ vt.T
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=2e-4)
    assert (np.diag(rotated) > low).all()


@pytest.mark.parametrize(("out", "in_"), [(10, 28), (28, 10), (16, 16)])
def test_batched_equals_a_loop_over_matrices(out, in_):
    x = jax.random.normal(jax.random.key(1), (3, 5, 2, out, in_)) * jnp.logspace(-6, 6, 5).reshape(
        1, 5, 1, 1, 1
    )
    jitted = jax.jit(orthogonalize)
    batched = jitted(x)
    for index in np.ndindex(3, 5, 2):
        np.testing.assert_allclose(batched[index], jitted(x[index]), atol=5e-6)


def test_magnitude_does_not_matter_even_at_the_ends_of_float32():
    x = jax.random.normal(jax.random.key(2), (6, 9))
    want = orthogonalize(x)
    for factor in (1e-30, 1e-20, 1e20, 1e30):
        np.testing.assert_allclose(orthogonalize(x * factor), want, atol=1e-5)


def test_zero_matrix_stays_zero_and_leaves_its_neighbours_alone():
    x = jax.random.normal(jax.random.key(3), (4, 6, 9)).at[2].set(0.0)
    y = orthogonalize(x)
    assert (y[2] == 0.0).all()
    np.testing.assert_allclose(y[1], orthogonalize(x[1]), atol=1e-6)
    assert (orthogonalize(jnp.full((3, 4), 1e-41)) == 0.0).all()  # below the smallest normal float32


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_stays_visible_and_in_its_own_matrix(bad):
    y = orthogonalize(jax.random.normal(jax.random.key(4), (4, 6, 9)).at[2, 1, 1].set(bad))
    assert jnp.isnan(y[2]).any()
    assert jnp.isfinite(y[jnp.array([0, 1, 3])]).all()


def test_dtype_of_the_products_follows_the_input_unless_asked():
    def products(x, **options):
        return {dot.outvars[0].aval.dtype.name for dot in dots(x, **options)}

    single, half = jnp.ones((4, 6)), jnp.ones((4, 6), jnp.bfloat16)
    assert products(single) == {"float32"}
    assert products(half) == {"bfloat16"}
    assert products(single, dtype=jnp.bfloat16) == {"bfloat16"}
    assert orthogonalize(half).dtype == jnp.bfloat16
    assert orthogonalize(single, dtype=jnp.bfloat16).dtype == jnp.float32


def test_bfloat16_stays_near_float32():
    x = jax.random.normal(jax.random.key(5), (3, 12, 40))
    error = orthogonalize(x, dtype=jnp.bfloat16) - orthogonalize(x)
    assert 0.0 < jnp.abs(error).max() < 0.03


def test_tall_matrices_work_on_their_smaller_side():
    def sides(shape):
        return {dot.outvars[0].aval.shape for dot in dots(jnp.ones(shape))}

    assert sides((3, 40, 12)) == {(3, 12, 12), (3, 12, 40)}
    assert sides((3, 12, 40)) == {(3, 12, 12), (3, 12, 40)}


def test_more_steps_repeat_the_last_polynomial():
    x = jax.random.normal(jax.random.key(6), (8, 8))
    values = lambda steps: np.linalg.svd(orthogonalize(x, "you_jiacheng", steps), compute_uv=False)
    off = [float(np.abs(values(steps) - 1).max()) for steps in (1, 3, 5, 7)]
    assert off[0] > off[1] > off[2] > off[3]
    np.testing.assert_array_equal(orthogonalize(x, "you_jiacheng", 5), orthogonalize(x, "you_jiacheng"))


def test_shapes_beyond_two_to_the_31_elements():
    x = jax.ShapeDtypeStruct((3, 257, 2, 2048, 7168), jnp.float32)
    assert x.size > 2**31
    y = jax.eval_shape(orthogonalize, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.usefixtures("unchecked")
def test_refuses_vectors_integers_and_unknown_names():
    with pytest.raises(ValueError, match=r"needs \(\.\.\., out, in\), found shape \(7,\)"):
        orthogonalize(jnp.ones(7))
    with pytest.raises(TypeError, match="int32"):
        orthogonalize(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="unknown coefficients 'cubic'"):
        orthogonalize(jnp.ones((3, 4)), "cubic")
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        orthogonalize(jnp.ones((3, 4)), steps=0)
