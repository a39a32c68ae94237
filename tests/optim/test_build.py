import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.config import OptimizerConfig
from jaxmoe.optim import build_optimizer, muon, schedule

L, E, F, D, V = 2, 5, 6, 7, 11

ROLES = {
    "embedding": "embedding",
    "lm_head": "embedding",
    "layers": ({"norm": "vector", "router": "router", "experts": "matrix", "shared_gate": "matrix"},),
}
SHAPES = {
    "embedding": (V, D),
    "lm_head": (V, D),
    "layers": ({"norm": (L, D), "router": (L, E, D), "experts": (L, E, 2, F, D), "shared_gate": (L, 1, D)},),
}


def tree(seed, dtype=jnp.float32):
    leaves, structure = jax.tree.flatten(
        SHAPES, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int)
    )
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, leaves, strict=True)]
    return structure.unflatten(drawn)


def config(**keys):
    defaults = {"learning_rate": 0.01, "schedule": "constant", "clip_norm": None}
    return OptimizerConfig(**(defaults | keys))


def one_update(settings, params, gradients, steps=10):
    optimizer = build_optimizer(settings, ROLES, steps)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)


def moves_by_adam(update, gradient, decay, param, learning_rate=0.01):
    """The first step of AdamW is the sign of the gradient."""
    np.testing.assert_allclose(
        update, -learning_rate * (jnp.sign(gradient) + decay * param), rtol=1e-3, atol=1e-6
    )


def moves_by_muon(update, gradient, decay, param, learning_rate=0.01):
    alone = muon(learning_rate, weight_decay=decay)
    want, _ = alone.update(gradient, alone.init(param), param)
    np.testing.assert_allclose(update, want, atol=1e-6)


def test_adamw_takes_everything_and_decays_all_but_vectors():
    params, gradients = tree(0), tree(1)
    update, _ = one_update(config(name="adamw", weight_decay=0.2), params, gradients)
    for name in ("embedding", "lm_head"):
        moves_by_adam(update[name], gradients[name], 0.2, params[name])
    for name, decay in {"norm": 0.0, "router": 0.2, "experts": 0.2, "shared_gate": 0.2}.items():
        moves_by_adam(*(x["layers"][0][name] for x in (update, gradients)), decay, params["layers"][0][name])


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_muon_takes_matrices_and_by_choice_routers(router):
    params, gradients = tree(0), tree(1)
    settings = config(name="muon", router=router, weight_decay=0.2, adam_learning_rate=0.003)
    update, _ = one_update(settings, params, gradients)
    got, gradient, param = (x["layers"][0] for x in (update, gradients, params))
    moves_by_muon(got["experts"], gradient["experts"], 0.2, param["experts"])
    moves_by_adam(got["shared_gate"], gradient["shared_gate"], 0.2, param["shared_gate"], 0.003)
    moves_by_adam(got["norm"], gradient["norm"], 0.0, param["norm"], 0.003)
    if router == "muon":
        moves_by_muon(got["router"], gradient["router"], 0.2, param["router"])
    else:
        moves_by_adam(got["router"], gradient["router"], 0.2, param["router"], 0.003)
    for name in ("embedding", "lm_head"):
        moves_by_adam(update[name], gradients[name], 0.2, params[name], 0.003)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_and_updates_are_float32_for_bfloat16_parameters(name):
    params, gradients = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    update, state = one_update(config(name=name), params, gradients)
    floats = [x.dtype for x in jax.tree.leaves((update, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    assert optax.apply_updates(params, update)["embedding"].dtype == jnp.bfloat16


def test_state_keeps_its_structure_and_dtypes_over_steps():
    optimizer = build_optimizer(config(name="muon"), ROLES, 10)
    params = tree(0, jnp.bfloat16)
    state = optimizer.init(params)
    _, after = optimizer.update(tree(1, jnp.bfloat16), state, params)
    describe = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert describe(after) == describe(state)


def test_gradients_are_clipped_by_their_global_norm():
    params, gradients = tree(0), tree(1)
    norm = optax.tree.norm(gradients)
    adam = lambda state: optax.tree.get(state, "mu", filtering=lambda path, _: "plain" in str(path))
    for clip_norm in (0.5, None):
        _, state = one_update(config(name="adamw", clip_norm=clip_norm), params, gradients)
        factor = 1.0 if clip_norm is None else clip_norm / norm
        norm_gradient = gradients["layers"][0]["norm"]
        np.testing.assert_allclose(adam(state)["layers"][0]["norm"], 0.1 * factor * norm_gradient, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_clipping_is_that_of_optax_and_keeps_no_clipped_gradients(clip_norm):
    """On a CPU they would be written once and read by each moment."""
    params = {"weight": jnp.ones((512, 640))}
    gradients = {"weight": jax.random.normal(jax.random.key(0), (512, 640)) / 100}
    settings = config(name="adamw", clip_norm=clip_norm)
    optimizer = build_optimizer(settings, {"weight": "matrix"}, 10)
    state = optimizer.init(params)
    program = jax.jit(lambda *operands: optimizer.update(*operands)).lower(gradients, state, params)
    entry = program.compile().as_text().partition("ENTRY")[2]
    # Gradient, weight, two moments; the update and both moments again.
    assert entry.count(" = f32[512,640]") == 7

    clip = optax.clip_by_global_norm(clip_norm)
    clipped, _ = clip.update(gradients, clip.init(params))
    unclipped = build_optimizer(config(name="adamw", clip_norm=None), {"weight": "matrix"}, 10)
    want, wanted_state = jax.jit(unclipped.update)(clipped, unclipped.init(params), params)
    update, new_state = jax.jit(optimizer.update)(gradients, state, params)
    np.testing.assert_allclose(update["weight"], want["weight"], rtol=1e-5)
    for name in ("mu", "nu"):
        moments = [
            optax.tree.get(each, name, filtering=lambda path, _: "decayed" in str(path))["weight"]
            for each in (new_state, wanted_state)
        ]
        np.testing.assert_allclose(*moments, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_constant_never_moves(name):
    optimizer = build_optimizer(config(name=name, weight_decay=0.2), {"bias": "constant"}, 10)
    params = {"bias": jnp.arange(1.0, 4.0)}
    update, state = optimizer.update({"bias": jnp.ones(3)}, optimizer.init(params), params)
    np.testing.assert_array_equal(update["bias"], jnp.zeros(3))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(state)), "no moments are kept of it"


def test_roles_must_be_known_and_complete():
    with pytest.raises(ValueError, match=r"unknown roles.*: lm_head: 'head'"):
        build_optimizer(config(), ROLES | {"lm_head": "head"}, 10)
    with pytest.raises(ValueError, match=r"without a role: \['extra'\]; without a parameter: \[\]"):
        build_optimizer(config(), ROLES, 10).init(tree(0) | {"extra": jnp.ones((3, 4))})
    with pytest.raises(
        ValueError, match=r"embedding: the role 'matrix' needs \(\.\.\., out, in\), found shape \(7,\)"
    ):
        build_optimizer(config(), {"embedding": "matrix"}, 10).init({"embedding": jnp.ones(7)})


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedule_warms_up_from_a_fraction_and_ends_at_the_final_fraction(shape):
    settings = config(learning_rate=2e-3, schedule=shape, warmup_steps=4, final_fraction=0.25)
    rate = schedule(settings, 20)
    rates = [float(rate(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:4], [0.5e-3, 1e-3, 1.5e-3, 2e-3], rtol=1e-6)
    assert rates[19] == pytest.approx(2e-3 if shape == "constant" else 0.5e-3)
    assert float(rate(500)) == pytest.approx(rates[19])
    if shape == "linear":
        np.testing.assert_allclose(np.diff(rates[3:]), -1.5e-3 / 16, rtol=1e-3)
    if shape == "cosine":
        assert rates[11] == pytest.approx(0.5 * (2e-3 + 0.5e-3))
        assert rates[4] > 0.99 * 2e-3


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (0, 7)])
def test_schedule_at_its_edges(warmup, total):
    rate = schedule(config(learning_rate=1.0, schedule="cosine", warmup_steps=warmup), total)
    assert float(rate(max(warmup - 1, 0))) == pytest.approx(1.0)
    assert float(rate(0)) == pytest.approx(1.0 / max(warmup, 1))
    assert float(rate(total - 1)) == pytest.approx(1.0 if total <= max(warmup, 1) else 0.1)


def test_the_optimiser_follows_the_schedule():
    settings = config(name="adamw", schedule="linear", warmup_steps=2, weight_decay=0.0)
    optimizer = build_optimizer(settings, ROLES, 6)
    params, gradients = tree(0), jax.tree.map(jnp.ones_like, tree(0))
    state, rate = optimizer.init(params), schedule(settings, 6)
    for step in range(6):
        update, state = optimizer.update(gradients, state, params)
        np.testing.assert_allclose(update["embedding"], -rate(step), rtol=1e-3)


def test_filters_decay_and_rates_do_not():
    """What is neither matrix nor vector goes to AdamW, whatever the optimiser of matrices."""
    roles = {"filter": "convolution", "rate": "decay", "matrix": "matrix"}
    keys = jax.random.split(jax.random.key(3), 6)
    shapes = {"filter": (E, 4), "rate": (E,), "matrix": (F, D)}
    params, gradients = (
        {
            name: jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys[i::2], shapes.items(), strict=True)
        }
        for i in range(2)
    )
    optimizer = build_optimizer(config(name="muon", weight_decay=0.2), roles, 10)
    update, _ = optimizer.update(gradients, optimizer.init(params), params)
    moves_by_adam(update["filter"], gradients["filter"], 0.2, params["filter"])
    moves_by_adam(update["rate"], gradients["rate"], 0.0, params["rate"])
    moves_by_muon(update["matrix"], gradients["matrix"], 0.2, params["matrix"])


def test_what_is_frozen_has_no_state():
    params, gradients = tree(4), tree(5)
    frozen = {"layers": ({"norm": None, "experts": None},)}

    def without(whole):
        layer = whole["layers"][0] | frozen["layers"][0]
        return whole | {"layers": (layer,), "lm_head": None}

    settings = config(name="muon", weight_decay=0.2)
    optimizer = build_optimizer(settings, ROLES, 10)
    state = optimizer.init(without(params))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (L, E, 2, F, D) not in shapes
    assert shapes.count((V, D)) == 2, "both moments of the embedding, none of the head"
    update, _ = jax.jit(optimizer.update)(without(gradients), state, without(params))
    whole, _ = one_update(settings, params, gradients)
    np.testing.assert_allclose(update["embedding"], whole["embedding"], rtol=1e-6)
    np.testing.assert_allclose(
        update["layers"][0]["router"], whole["layers"][0]["router"], rtol=1e-4, atol=1e-7
    )
    assert update["lm_head"] is None


@pytest.mark.parametrize("freeze_idle", [True, False])
def test_the_configuration_says_whether_an_idle_expert_moves(freeze_idle):
    params, gradients = tree(6), tree(7)
    settings = config(name="muon", weight_decay=0.0, freeze_idle=freeze_idle)
    optimizer = build_optimizer(settings, ROLES, 10)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    layer = gradients["layers"][0]
    idle = layer | {"experts": layer["experts"].at[:, 3].set(0.0)}
    update, _ = optimizer.update(gradients | {"layers": (idle,)}, state, params)
    moved = jnp.abs(update["layers"][0]["experts"]).max(axis=(0, 2, 3, 4))
    assert (float(moved[3]) == 0.0) == freeze_idle
    assert float(jnp.delete(moved, 3).min()) > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rates_of_their_own(name):
    """As LoRA+ has them; what is frozen has no factor either."""
    params, gradients = tree(0), tree(1)
    rates = jax.tree.map(lambda _: 1.0, params) | {"embedding": 16.0, "lm_head": None}
    frozen = [values | {"lm_head": None} for values in (params, gradients)]
    plain, raised = (
        build_optimizer(config(name=name, weight_decay=0.3), ROLES, 10, given) for given in (None, rates)
    )
    one, other = (
        optimizer.update(frozen[1], optimizer.init(frozen[0]), frozen[0])[0] for optimizer in (plain, raised)
    )
    np.testing.assert_allclose(other["embedding"], 16 * one["embedding"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, other["layers"], one["layers"])
    assert other["lm_head"] is None
