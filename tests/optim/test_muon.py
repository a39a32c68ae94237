import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.devices import xla_flags

from jaxmoe.optim import muon, orthogonalize
from jaxmoe.optim.muon import scale_by_muon, shape_scale

L, E, G, F, D = 3, 5, 2, 20, 28


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def one_update(gradient, **options):
    transform = scale_by_muon(**options)
    return jax.jit(transform.update)(gradient, transform.init(gradient))[0]


def rms(x):
    return float(jnp.sqrt(jnp.mean(x * x)))


@pytest.mark.parametrize("experts", [1, 4, 32])
@pytest.mark.parametrize(("out", "in_"), [(16, 48), (48, 16), (32, 32)])
def test_update_rms_is_about_a_fifth_of_the_learning_rate_for_any_number_of_experts(experts, out, in_):
    params = {"w": normal(0, 2, experts, out, in_)}
    transform = muon(0.01, scale="rms")
    update, _ = jax.jit(transform.update)(
        {"w": normal(1, *params["w"].shape)}, transform.init(params), params
    )
    assert rms(update["w"]) == pytest.approx(0.2 * 0.01, rel=0.05)


@pytest.mark.parametrize(
    ("scale", "want"),
    [("rms", 0.2 * 48**0.5), ("jordan", (48 / 16) ** 0.5), ("spectral", (48 / 16) ** 0.5)],
)
def test_scale_of_a_tall_matrix(scale, want):
    gradient = normal(2, 7, 48, 16)
    np.testing.assert_allclose(
        one_update(gradient, scale=scale), want * orthogonalize(gradient), rtol=1e-4, atol=2e-6
    )


def test_scale_of_a_wide_matrix():
    assert shape_scale("rms", 16, 48) == pytest.approx(0.2 * 48**0.5)
    assert shape_scale("jordan", 16, 48) == 1.0
    assert shape_scale("spectral", 16, 48) == pytest.approx((16 / 48) ** 0.5)


def test_a_stack_equals_a_loop_over_layers_experts_gate_and_up():
    gradient = normal(3, L, E, G, F, D) * jnp.logspace(-4, 4, E).reshape(1, E, 1, 1, 1)
    update, transform = one_update(gradient), scale_by_muon()
    alone = jax.jit(lambda one: transform.update(one, transform.init(one))[0])
    for index in np.ndindex(L, E, G):
        np.testing.assert_allclose(update[index], alone(gradient[index]), atol=2e-6)


def test_permuting_experts_permutes_updates():
    gradient, order = normal(4, L, E, G, F, D), np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(one_update(gradient[:, order]), one_update(gradient)[:, order], atol=1e-6)


def test_gate_and_up_do_not_mix():
    gradient = normal(5, L, E, G, F, D)
    changed = gradient.at[:, :, 1].set(normal(6, L, E, F, D))
    np.testing.assert_allclose(one_update(changed)[:, :, 0], one_update(gradient)[:, :, 0], atol=1e-6)
    assert jnp.abs(one_update(changed)[:, :, 1] - one_update(gradient)[:, :, 1]).max() > 0.01


def test_an_expert_without_gradient_does_not_move_at_first_and_disturbs_no_other():
    gradient = normal(7, L, E, F, D)
    update = one_update(gradient.at[:, 2].set(0.0))
    assert (update[:, 2] == 0.0).all()
    others = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(update[:, others], one_update(gradient)[:, others], atol=1e-6)


def test_an_idle_expert_moves_at_full_size_on_stale_momentum_unless_frozen():
    gradient = normal(8, L, E, F, D)
    idle = gradient.at[:, 2].set(0.0)
    for freeze in (False, True):
        transform = scale_by_muon(freeze_idle=freeze)
        step = jax.jit(transform.update)
        _, state = step(gradient, transform.init(gradient))
        update, frozen_state = step(idle, state)
        assert rms(update[:, 3]) == pytest.approx(0.2, rel=0.05)
        assert rms(update[:, 2]) == (0.0 if freeze else pytest.approx(0.2, rel=0.05))
        np.testing.assert_allclose(frozen_state.momentum[:, 2], 0.95 * state.momentum[:, 2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_state_is_the_float32_average_of_the_gradients_whatever_orthogonalisation_did(dtype, nesterov):
    gradients = [normal(seed, L, E, F, D).astype(dtype) for seed in range(9, 12)]
    transform = scale_by_muon(nesterov=nesterov, momentum=0.9, dtype=jnp.bfloat16)
    step = jax.jit(transform.update)
    state, want = transform.init(gradients[0]), np.zeros((L, E, F, D), np.float32)
    for gradient in gradients:
        before = np.array(state.momentum)
        update, after = step(gradient, state)
        np.testing.assert_array_equal(before, state.momentum)
        want = np.float32(0.9) * want + np.float32(1.0 - 0.9) * np.asarray(gradient, np.float32)
        state = after
    assert state.momentum.dtype == jnp.float32
    np.testing.assert_allclose(state.momentum, want, rtol=1e-6, atol=1e-7)
    assert update.dtype == jnp.float32


def test_nesterov_looks_one_step_ahead():
    first, second = normal(12, F, D), normal(13, F, D)
    for nesterov in (True, False):
        transform = scale_by_muon(nesterov=nesterov, momentum=0.8)
        step = jax.jit(transform.update)
        _, state = step(first, transform.init(first))
        update, _ = step(second, state)
        average = 0.8 * 0.2 * first + 0.2 * second
        ahead = 0.8 * average + 0.2 * second if nesterov else average
        np.testing.assert_allclose(update, 0.2 * D**0.5 * orthogonalize(ahead), rtol=1e-4, atol=1e-5)


def test_weight_decay_is_decoupled():
    params = {"a": normal(14, F, D)}
    gradients = {"a": jnp.zeros((F, D))}
    transform = muon(lambda step: 0.5 / (1 + step), weight_decay=0.1)
    state, step = transform.init(params), jax.jit(transform.update)
    for factor in (0.5, 0.25):
        update, state = step(gradients, state, params)
        np.testing.assert_allclose(update["a"], -factor * 0.1 * params["a"], rtol=1e-6)


def test_descends():
    target = normal(16, E, F, D)
    loss = lambda w: jnp.mean((w - target) ** 2)
    params, transform = jnp.zeros((E, F, D)), muon(optax.linear_schedule(0.3, 0.0, 60))

    @jax.jit
    def step(params, state):
        update, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, update), state

    state = transform.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.03 * loss(jnp.zeros((E, F, D)))


def test_shapes_beyond_two_to_the_31_elements():
    params = {"gate_up": jax.ShapeDtypeStruct((61, 256, 2, 2048, 7168), jnp.bfloat16)}
    transform = muon(0.01, weight_decay=0.1)
    state = jax.eval_shape(transform.init, params)
    update, after = jax.eval_shape(transform.update, params, state, params)
    assert update["gate_up"].shape == params["gate_up"].shape
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert shape_scale("rms", 2048, 7168) == pytest.approx(0.2 * 7168**0.5)


def test_refuses_what_is_no_matrix_and_unknown_options():
    with pytest.raises(ValueError, match=r"found params\['norm'\] of \(7,\)"):
        scale_by_muon().init({"norm": jnp.ones(7)})
    with pytest.raises(ValueError, match="unknown scale 'moonlight'"):
        muon(0.1, scale="moonlight")
    with pytest.raises(ValueError, match="unknown coefficients 'cubic'"):
        muon(0.1, coefficients="cubic")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), found 1.0"):
        muon(0.1, momentum=1.0)


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from jaxmoe.optim import muon

    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    transform = muon(0.01, weight_decay=0.1)

    @jax.jit
    def update(gradient, params):
        return transform.update(gradient, transform.init(params), params)[0]

    for out, in_ in ((8, 24), (24, 8), (16, 16)):
        gradient = jax.random.normal(jax.random.key(0), (4, 8, 2, out, in_))
        params = jax.random.normal(jax.random.key(1), (4, 8, 2, out, in_))
        want = np.asarray(update(gradient, params))
        specs = [PartitionSpec(*[None] * axis, name) for axis, name in
                 ((0, "a"), (1, ("a", "b")), (2, "b"), (3, ("a", "b")), (4, ("a", "b")))]
        specs.append(PartitionSpec(None, None, None, "a", "b"))
        specs.append(PartitionSpec(None, "b", None, None, "a"))
        for spec in specs:
            sharding = NamedSharding(mesh, spec)
            placed = [jax.device_put(x, sharding) for x in (gradient, params)]
            assert not placed[0].is_fully_replicated
            got = np.asarray(jax.jit(update, out_shardings=sharding)(*placed))
            np.testing.assert_allclose(got, want, atol=1e-6, err_msg=f"{out}x{in_} {spec}")
    print("equal")
"""


def test_sharded_equals_replicated_for_every_axis_and_orientation():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(8),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("equal\n")


def test_a_model_of_experts_is_orthogonalised_one_layer_at_a_time():
    gradient, transform = jnp.ones((L, E, G, F, D)), scale_by_muon()
    memory = jax.jit(transform.update).lower(gradient, transform.init(gradient)).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not analyse memory")
    assert memory.temp_size_in_bytes < 1.5 * gradient.nbytes
