"""The mesh: what shards what, and that a sharded step computes what an unsharded one does."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drawn
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe import UserError, params
from jaxmoe.config import OptimizerConfig
from jaxmoe.interop.pretrained import from_config
from jaxmoe.model.batch import learning_batch
from jaxmoe.model.mixers import attend
from jaxmoe.model.mixers.blockwise import blockwise_attention
from jaxmoe.optim import build_optimizer
from jaxmoe.parallel import sharding
from jaxmoe.params import named
from jaxmoe.training.state import abstract_state, init_state
from jaxmoe.training.step import StepSpec, make_train_step

AXES = ("data", "fsdp", "expert", "tensor")


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def test_table():
    declared = params.Param("LEGFD", (3, 4, 2, 8, 6), "normal", "matrix")
    assert sharding.partition_spec(declared) == PartitionSpec(None, "expert", None, "tensor", "fsdp")
    assert sharding.partition_spec(params.Param("D", (6,), "ones", "vector")) == PartitionSpec()


def test_two_letters_on_one_axis_are_refused():
    declared = params.Param("FV", (8, 6), "normal", "matrix")
    with pytest.raises(ValueError, match="two letters on one mesh axis"):
        sharding.partition_spec(declared)


def test_mesh_must_fit():
    with pytest.raises(UserError, match=r"data=1, fsdp=3, .* needs 3 devices but this run has 8"):
        sharding.make_mesh(fsdp=3)
    tree = from_config(families.config_json("mixtral"), "float32").spec.declared
    with pytest.raises(UserError, match="E=12 is not divisible by expert=8"):
        sharding.shardings(tree, mesh_of(1, 1, 8, 1))
    # 4 heads of 16: their 64 rows could be cut in eight, a head must not be.
    with pytest.raises(UserError, match=r"q_proj: N=4 \(query heads\) is not divisible by tensor=8"):
        sharding.shardings(tree, mesh_of(1, 1, 1, 8))
    sharding.shardings(tree, mesh_of(1, 1, 1, 4))  # 2 key-value heads are repeated


MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 2, 1), (1, 1, 1, 4), (1, 2, 2, 2), (2, 1, 2, 2)]


def all_of(spec):
    """Every parameter is trained."""
    return jax.tree.map(lambda _: True, spec.declared)


def micro_batches(tokens, positions, segments):
    """(count, B, T) each."""
    parts = [learning_batch(*part) for part in zip(tokens, positions, segments, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def trained(mesh, steps=2, name="muon"):
    """Weights and metrics after some steps of a tiny model, from the same start on any mesh."""
    model = drawn.model_of("qwen3_moe", seed=5)
    spec = model.spec
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=1)
    optimizer = build_optimizer(config, params.roles(spec.declared), 10)
    # clip_norm divides by a norm over all shards; muon orthogonalises matrices that are split over devices.
    step_spec = StepSpec(spec, jnp.dtype("float32"), True, aux_loss=0.02, z_loss=0.01)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, spec.vocab_size, (2, 8, 21)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, :3, 13:] = 2
    segments[:, 5, 17:] = 0
    positions = np.where(segments == 2, np.arange(21) - 13, np.arange(21)).astype(np.int32)
    with jax.set_mesh(mesh):
        weights = jax.device_put(model.pure_params(), sharding.shardings(spec.declared, mesh))
        mask = all_of(spec)
        state = init_state(weights, optimizer, mask, 0, mesh)
        where = jax.tree.map(lambda x: x.sharding, state)
        planned = abstract_state(optimizer, spec.declared, mask, jnp.float32, mesh)
        assert jax.tree.map(lambda x: x.sharding, planned) == where
        step = make_train_step(step_spec, optimizer, optax.constant_schedule(0.01), where)
        batch = micro_batches(tokens, positions, segments)
        for _ in range(steps):
            state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh, leading=1)))
            # Eight devices share the threads of a few cores: one step's collectives may wait for those of the next.
            jax.block_until_ready(state)
    return jax.device_get(state.params), jax.device_get(metrics), state


@pytest.fixture(scope="module")
def alone():
    return trained(mesh_of(1, 1, 1, 1))


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_step_equals_unsharded(shape, alone):
    weights, metrics, state = trained(mesh_of(*shape))
    for (name, a), (_, b) in zip(named(weights), named(alone[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, err_msg=name)
    for (name, a), (_, b) in zip(named(metrics), named(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
    experts = state.params["groups"][0][1]["experts"]["gate_up"]
    held = experts.addressable_shards[0].data.size * shape[1] * shape[2] * shape[3]
    assert held == experts.size, "each device holds its own part only"


def test_accumulation_changes_only_rounding():
    """Two micro-batches of 4 and one batch of 8 rows, with unequal numbers of targets in each."""
    model = drawn.model_of("mixtral", seed=6)
    spec = StepSpec(model.spec, jnp.dtype("float32"), False, aux_loss=0.0, z_loss=0.02)
    sgd = optax.sgd(1.0)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 104, (8, 15)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:3, 4:] = 0
    batch = learning_batch(tokens, np.tile(np.arange(15, dtype=np.int32), (8, 1)), segments)
    mesh = mesh_of(1, 1, 1, 1)
    results = []
    for count in (1, 2):
        with jax.set_mesh(mesh):
            weights = jax.tree.map(jnp.array, model.pure_params())
            state = init_state(weights, sgd, all_of(model.spec), 0, mesh)
            step = make_train_step(spec, sgd, optax.constant_schedule(1.0), None)
            micro = jax.tree.map(lambda x, count=count: x.reshape(count, 8 // count, 15), batch)
            state, metrics = step(state, micro)
            results.append((jax.device_get(state.params), float(metrics["loss"]), float(metrics["targets"])))
    assert results[0][2] == results[1][2] == 3 * 3 + 5 * 14
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_padded_rows_need_no_mask(monkeypatch):
    """Documents from the start of their rows: the same step without a mask of documents."""
    model = drawn.model_of("qwen3_moe", seed=7)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 104, (2, 3, 15)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 1, 6:] = 0
    positions = np.where(segments > 0, np.arange(15, dtype=np.int32), 0)
    masked = []

    def spy(q, k, v, segments, **options):
        masked.append(segments is not None)
        return blockwise_attention(q, k, v, segments, **options)

    monkeypatch.setattr(attend, "blockwise_attention", spy)
    mesh = mesh_of(1, 1, 1, 1)
    results = []
    for packed in (True, False):
        masked.clear()
        spec = StepSpec(model.spec, jnp.dtype("float32"), True, aux_loss=0.01, z_loss=0.02, packed=packed)
        with jax.set_mesh(mesh):
            state = init_state(
                jax.tree.map(jnp.array, model.pure_params()), optax.sgd(1.0), all_of(model.spec), 0, mesh
            )
            step = make_train_step(spec, optax.sgd(1.0), optax.constant_schedule(1.0), None)
            state, metrics = step(state, micro_batches(tokens, positions, segments))
        assert set(masked) == {packed}
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    for (name, a), (_, b) in zip(named(results[0]), named(results[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


def test_letters_of_activations_are_those_of_parameters():
    batch = ("data", "fsdp", "expert")
    assert sharding.spec_of("BTD") == PartitionSpec(batch, "context", None), (
        "the batch has the axis of the width"
    )
    assert sharding.spec_of("BTNH") == PartitionSpec(batch, "context", "tensor", None)
    assert sharding.spec_of("VD") == sharding.partition_spec(params.Param("VD", (8, 6), "normal", "matrix"))
    assert sharding.spec_of("V.") == PartitionSpec("tensor", None)
    assert sharding.spec_of("BTD", ("fsdp", "tensor")) == PartitionSpec("fsdp", None, None), (
        "a mesh may lack axes"
    )
    x = jnp.ones((8, 4, 6))
    assert sharding.constrain(x, "BTD") is x, "nothing without a mesh"
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: sharding.constrain(2 * x, "BTD"))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 4, 6)
