"""Indexers in a run: they stay as they are, or have a loss of their own, which is nothing to the rest."""

import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.runs import run_config, write_workspace
from safetensors.numpy import load_file

import jaxmoe
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.interop.source import config_source
from jaxmoe.model.module import MoEModel
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import initialize, named
from jaxmoe.run import loop
from jaxmoe.run.assemble import assemble


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Text, and a model whose queries choose from more keys than they see."""
    folder = write_workspace(tmp_path_factory.mktemp("indexers"))
    source = config_source(families.config_json("glm_moe_dsa", index_topk=5, num_hidden_layers=3))
    params = initialize(source.spec.declared, jax.random.key(0), 0.2, jnp.float32)
    dsa = folder / "dsa"
    jaxmoe.save_pretrained(MoEModel(source.spec, params, jnp.dtype("float32"), source=source), dsa / "model")
    tiny.write_tokenizer(dsa / "model", source.spec.vocab_size)
    (dsa / "text").symlink_to(folder / "text")
    return folder


def config_of(workspace, output, steps=2, **changes):
    given = {"train__steps": steps, "train__eval_every": None, "mesh": {"fsdp": 2, "expert": 2, "tensor": 2}}
    return RunConfig.from_mapping(run_config(workspace / "dsa", output, **(given | changes)))


def tensors_of(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def trained(workspace, output, **changes):
    """Tensors before and after."""
    loop.run(config_of(workspace, output, **changes))
    return tensors_of(workspace / "dsa" / "model"), tensors_of(output / "export")


def losses_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["indexer_loss"] for line in map(json.loads, lines) if "indexer_loss" in line]


def test_they_stay_as_they_are(workspace, tmp_path):
    before, after = trained(workspace, tmp_path / "run")
    for name, old in before.items():
        constant = "indexer" in name or "correction" in name
        assert (old == after[name]).all() == constant, name
    assert not losses_of(tmp_path / "run")
    state = assemble(config_of(workspace, tmp_path), make_mesh(fsdp=2, expert=2, tensor=2)).state
    for part in (state.trainable, state.opt_state):
        assert not [name for name, _ in named(part) if "indexer" in name]


def test_a_loss_of_their_own_is_nothing_to_the_rest(workspace, tmp_path):
    """In the first step, after which they choose other keys."""
    options = {"steps": 1, "optimizer__warmup_steps": 0, "optimizer__clip_norm": None}
    _, plain = trained(workspace, tmp_path / "plain", **options)
    before, after = trained(workspace, tmp_path / "run", train__indexer_loss=0.5, **options)
    for name, value in after.items():
        if "indexer" in name:
            assert (value != before[name]).any(), name
        else:
            np.testing.assert_allclose(value, plain[name], atol=1e-5, err_msg=name)


def test_their_loss_falls(workspace, tmp_path):
    options = {"optimizer__learning_rate": 0.01, "optimizer__name": "adamw", "trainable": ["indexer"]}
    before, after = trained(workspace, tmp_path / "run", train__indexer_loss=1.0, steps=12, **options)
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    for name, old in before.items():
        assert (old == after[name]).all() == ("indexer" not in name), name


ADAPTER = {"rank": 2, "target_modules": "all-linear"}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_adapters_on_them(workspace, tmp_path, weight):
    """PEFT's all-linear has them too; without a loss theirs stay as they began."""
    trained_config = config_of(workspace, tmp_path / "run", adapter=ADAPTER, train__indexer_loss=weight)
    loop.run(trained_config)
    pairs = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    found = {name: array.any() for name, array in pairs.items() if "indexer" in name and "lora_B" in name}
    assert len(found) == 2 * 3, "three matrices of two indexers"
    assert set(found.values()) == {weight > 0}
    assert all(array.any() for name, array in pairs.items() if "q_b_proj" in name)


def test_a_loss_that_trains_nothing_is_refused(workspace, tmp_path):
    mesh, told = (
        make_mesh(fsdp=2, expert=2, tensor=2),
        "train.indexer_loss = 0.5 reaches nothing that is trained",
    )
    without = run_config(workspace, tmp_path, train__indexer_loss=0.5)
    frozen = config_of(workspace, tmp_path, frozen=["indexer"], train__indexer_loss=0.5)
    for config in (RunConfig.from_mapping(without), frozen):
        with pytest.raises(UserError, match=told):
            assemble(config, mesh)
    with pytest.raises(UserError, match="matches .*indexer.*, which no gradient changes"):
        assemble(config_of(workspace, tmp_path, trainable=["indexer"]), mesh)
