"""A run put together for a described device: what depends on the device is that one's and not this machine's."""

import families
import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxmoe import UserError
from jaxmoe.config import RunConfig
from jaxmoe.kernels.devices import Device
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run.assemble import assemble
from jaxmoe.run.meter import peak_flops

H200 = Device("NVIDIA H200", "gpu", 132, (9, 0), present=False)


def config(**changes):
    """A run with sizes that the kernels and cuDNN take."""
    raw = families.config_json(
        "qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=128, num_hidden_layers=2
    )
    mapping = {
        "model": {"config": raw},
        "data": {"path": "python:stdlib", "sequence_length": 64, "tokenizer": {"train_bpe": 104}},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 3, "batch_size": 16, "micro_batch_size": 8},
        "output_dir": "never-made",
    }
    return RunConfig.from_mapping(mapping | changes)


def traced(assembled):
    with jax.set_mesh(assembled.mesh):
        return str(assembled.train_step.trace(assembled.state, assembled.batch).jaxpr)


def test_the_device_decides_about_attention_and_kernels(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)  # as where it is installed
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    there, here = (traced(assemble(config(), mesh, device)) for device in (H200, None))
    assert "dot_product_attention_fwd_wrapper" in there
    assert "wgmma" in there
    assert "dot_product_attention_fwd_wrapper" not in here
    assert "wgmma" not in here


def test_shapes_of_state_and_batch():
    assembled = assemble(config(), make_mesh(fsdp=4, tensor=2))
    assert {leaf.shape for leaf in jax.tree.leaves(assembled.batch)} == {(2, 8, 64)}
    assert assembled.batch.tokens.sharding.shard_shape((2, 8, 64)) == (2, 2, 64)
    assert jax.tree.structure(assembled.state.params) == jax.tree.structure(assembled.spec.declared)
    assert peak_flops("bfloat16", H200)[0] == 989.4e12
    with pytest.raises(ValueError, match="no peak is known of NVIDIA H200 in float32"):
        peak_flops("float32", H200)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="E=12 is not divisible by expert=8"):
        assemble(config(train={"steps": 3, "batch_size": 16}), make_mesh(expert=8))
