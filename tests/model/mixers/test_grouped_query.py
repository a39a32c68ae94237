"""Attention on a mesh, and which implementation is asked."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.devices import Device
from jaxmoe.kernels.logs import log_once
from jaxmoe.model.batch import Batch
from jaxmoe.model.mixers import attend as attention
from jaxmoe.model.mixers.context import make_context
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.parallel.sharding import BATCH_AXES, current_mesh, make_mesh, shardings
from jaxmoe.params import initialize, named

attend = jax.nn.dot_product_attention


def attend_per_device(q, k, v, *, mask, **options):
    """As cuDNN is partitioned: each device's own heads and nothing else."""
    options |= {"implementation": "xla"}
    if current_mesh() is None:
        return attend(q, k, v, mask=mask, **options)
    heads, rows = P(BATCH_AXES, None, "tensor"), P(BATCH_AXES)
    return jax.shard_map(
        lambda q, k, v, mask: attend(q, k, v, mask=mask, **options),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, mask)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tensor", "options"),
    [
        (8, 4, 2, {}),
        (16, 4, 8, {"qk_norm": QKNorm(NormSpec(1e-6), "head", values=True), "values_from_keys": True}),
        (12, 6, 4, {"qk_norm": QKNorm(NormSpec(1e-6), "full"), "gated": True, "value_dim": 6}),
        (8, 1, 2, {"bias": True, "window": 4}),
        (8, 4, 2, {"head_gated": True, "gate_activation": "softplus"}),
    ],
)
def test_every_device_has_the_keys_of_its_queries(num_heads, num_kv_heads, tensor, options, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend_per_device)
    monkeypatch.setattr(attention, "_implementation", lambda *_: "cudnn")
    spec = AttentionSpec(num_heads, num_kv_heads, 10, RopeSpec(1e4, 10), **options)
    declared = spec.params(24)
    weights = initialize(declared, jax.random.key(0), 0.3, jnp.float32)
    weights = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), weights)
    x = jax.random.normal(jax.random.key(1), (8, 7, 24))
    positions = jnp.tile(jnp.arange(7), (8, 1))
    segments = jnp.where(positions < 5, 1, 2)

    def loss(weights, x):
        context = make_context(spec.rotations(), Batch(None, positions, segments), jnp.float32)
        out = spec.apply(weights, x, context)
        return jnp.sum(jnp.sin(out)), out

    compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = jax.jit(lambda *operands: compute(*operands))(weights, x)
    mesh = make_mesh(fsdp=8 // tensor, tensor=tensor)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(weights, shardings(declared, mesh))
        got = jax.jit(lambda *operands: compute(*operands))(sharded, x)
    for (name, a), (_, b) in zip(named(got), named(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=1e-5, err_msg=name)


HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 0)


@pytest.mark.parametrize(
    ("gpu", "length", "width", "dtype", "masked", "sinks", "reason"),
    [
        (HOPPER, 64, 128, "bfloat16", True, False, None),
        (HOPPER, 64, 256, "float16", True, False, None),
        (HOPPER, 64, 128, "bfloat16", True, True, "cuDNN takes no attention sinks"),
        (None, 64, 128, "bfloat16", True, True, "-"),
        (HOPPER, 65, 128, "bfloat16", False, False, None),
        (HOPPER, 65, 128, "bfloat16", True, False, "even length, these have 65"),
        (HOPPER, 64, 264, "bfloat16", False, False, "up to 256 in eights on this GPU, the model has 264"),
        (HOPPER, 64, 100, "bfloat16", False, False, "in eights on this GPU, the model has 100"),
        (AMPERE, 64, 192, "bfloat16", False, False, "up to 128 in eights on this GPU, the model has 192"),
        (BLACKWELL, 64, 192, "bfloat16", False, False, "up to 128 in eights on this GPU, the model has 192"),
        (HOPPER, 64, 128, "float32", False, False, "the model computes in float32"),
        (None, 64, 128, "bfloat16", True, False, "-"),
    ],
)
def test_what_is_not_cudnn_says_why(gpu, length, width, dtype, masked, sinks, reason, caplog):
    device = Device("a device", "cpu" if gpu is None else "gpu", 132, gpu, present=True)
    log_once.cache_clear()
    queries = jax.ShapeDtypeStruct((2, length, 3, width), jnp.dtype(dtype))
    with caplog.at_level(logging.WARNING):
        chosen = [attention._implementation(queries, masked, sinks, device) for _ in range(2)]
    assert chosen == ["cudnn" if reason is None else "blockwise"] * 2
    if reason in (None, "-"):
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert reason in record.getMessage()


def test_cudnn_takes_no_selection_of_keys(caplog):
    device = Device("a device", "gpu", 132, HOPPER, present=True)
    log_once.cache_clear()
    queries = jax.ShapeDtypeStruct((2, 64, 3, 128), jnp.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert attention._implementation(queries, False, False, device, True) == "blockwise"
    assert "cuDNN takes no selection of keys" in caplog.text


def test_jax_asks_a_gpu_at_hand_about_wide_heads():
    for width, present, chosen in ((256, True, "cudnn"), (256, False, "blockwise"), (128, False, "cudnn")):
        queries = jax.ShapeDtypeStruct((2, 64, 3, width), jnp.bfloat16)
        device = Device("a device", "gpu", 132, HOPPER, present=present)
        assert attention._implementation(queries, True, False, device) == chosen
