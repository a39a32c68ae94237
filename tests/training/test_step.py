"""The loss of a step is a weighted mean, whatever the weights add up to."""

import dataclasses
import re

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.interop.pretrained import from_config
from jaxmoe.kernels.devices import device_at_hand
from jaxmoe.model import decoder
from jaxmoe.model.batch import learning_batch
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.training.state import checksum, init_state
from jaxmoe.training.step import StepSpec, _compiler_options, make_train_step


def test_weights_of_targets_are_relative():
    model = from_config(families.config_json("mixtral", num_hidden_layers=1), "float32", seed=2)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, model.spec.vocab_size, (3, 9)).astype(np.int32)
    weights = rng.uniform(0.001, 0.004, (3, 9)).astype(np.float32)
    weights[1, 2:5] = 0.0
    segments, positions = np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (3, 1))
    mesh = make_mesh(devices=jax.devices()[:1])
    results = []
    with jax.set_mesh(mesh):
        spec = StepSpec(model.spec, jnp.dtype("float32"), remat=False, aux_loss=0.0, z_loss=0.0)
        step = make_train_step(spec, optax.sgd(1.0), optax.constant_schedule(1.0), None)
        for factor in (1.0, 1000.0):
            batch = learning_batch(tokens, positions, segments, weights=factor * weights)
            everything = jax.tree.map(lambda _: True, model.spec.declared)
            state = init_state(
                jax.tree.map(jnp.array, model.pure_params()), optax.sgd(1.0), everything, 0, mesh
            )
            state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
            results.append((float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["targets"])))
        on_device = jax.tree.map(jnp.asarray, batch)
        hidden, _ = decoder.hidden_states(model.pure_params(), model.spec, on_device, dtype=jnp.float32)
        logps = jax.nn.log_softmax(decoder.logits(model.pure_params(), model.spec, hidden))
    picked = np.take_along_axis(np.asarray(logps), np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    want = -(batch.weights * picked).sum() / batch.weights.sum()
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0][0] == pytest.approx(want, rel=1e-5)
    assert results[0][2] == 3 * 8 - 3


def test_checksum_is_of_the_bits_however_they_are_sharded():
    mesh = make_mesh(fsdp=2, tensor=4)
    values = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.bfloat16)
    spread = jax.device_put(
        values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    )
    assert checksum({"a": values, "b": None}) == checksum({"a": spread}) == checksum([np.asarray(values)])
    assert checksum({"a": values.at[3, 2].add(0.5)}) != checksum({"a": values})
    assert checksum({"a": None}) is None


def test_step_takes_over_all_buffers_and_scatters_no_vocabulary():
    model = from_config(families.config_json("mixtral", num_hidden_layers=1), "float32", seed=2)
    mesh = make_mesh(devices=jax.devices()[:1])
    tokens = np.zeros((2, 9), np.int32)
    batch = learning_batch(tokens, np.tile(np.arange(9, dtype=np.int32), (2, 1)), np.ones_like(tokens))
    with jax.set_mesh(mesh):
        spec = StepSpec(model.spec, jnp.dtype("float32"), remat=False, aux_loss=0.0, z_loss=0.0)
        step = make_train_step(spec, optax.adamw(1e-3), optax.constant_schedule(1.0), None)
        everything = jax.tree.map(lambda _: True, model.spec.declared)
        state = init_state(
            jax.tree.map(jnp.array, model.pure_params()), optax.adamw(1e-3), everything, 0, mesh
        )
        text = step.lower(state, jax.tree.map(lambda x: x[None], batch)).compile().as_text()
    assert text.splitlines()[0].count("-alias)") == len(jax.tree.leaves(state))
    assert f"[{model.spec.vocab_size},{model.spec.width}]" in text
    assert not re.findall(rf"\[{model.spec.vocab_size},\d+\]\S* scatter\(", text)


def test_collectives_of_a_cpu_begin_in_one_order():
    """Without the option devices wait for each other for good, now and then; a single one has no collectives."""
    option = "xla_cpu_enable_concurrency_optimized_scheduler"
    cpu = device_at_hand()
    assert _compiler_options(cpu) == {}
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        assert _compiler_options(cpu)[option] is False
        assert _compiler_options(dataclasses.replace(cpu, platform="gpu")) == {}
