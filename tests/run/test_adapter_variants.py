"""Runs with variants of low-rank adapters: what they resume to, and what they leave for PEFT."""

import json

import jax
import numpy as np
import pytest
from helpers.runs import refused, run_config, run_until, small, write_workspace
from safetensors.numpy import load_file

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.model.dropout import Dropout
from jaxmoe.run import loop

ATTENTION = {"rank": 3, "alpha": 7, "target_modules": ["q_proj", "o_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("adapters"))


def config_of(workspace, output, **changes) -> RunConfig:
    given = {
        "mesh": {"data": 2, "expert": 2, "tensor": 2},
        "train__micro_batch_size": 8,
        "train__steps": 4,
        "train__eval_every": None,
        "optimizer__learning_rate": 0.02,
    }
    return RunConfig.from_mapping(run_config(workspace, output, **(given | changes)))


def test_dropout_resumes(workspace, tmp_path, monkeypatch):
    lora = ATTENTION | EXPERTS | {"dropout": 0.3}
    config = config_of(workspace, tmp_path / "whole", adapter=lora)
    loop.run(config)
    other = config_of(workspace, tmp_path / "parts", adapter=lora)
    run_until(other, 4, monkeypatch)
    loop.run(other)
    plain = config_of(workspace, tmp_path / "plain", adapter=lora | {"dropout": 0})
    loop.run(plain)
    whole, parts, without = (
        (tmp_path / name / "export" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "parts", "plain")
    )
    assert whole == parts
    assert whole != without
    said = json.loads((tmp_path / "whole" / "export" / "adapter_config.json").read_text())
    assert said["lora_dropout"] == 0.0, "PEFT refuses it beside target_parameters"


def test_every_step_and_micro_batch_drops_others(workspace, tmp_path, monkeypatch):
    seen = []
    plain = Dropout.__call__

    def noted(self, x):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(self.key))
        return plain(self, x)

    monkeypatch.setattr(Dropout, "__call__", noted)
    changes = {"adapter": ATTENTION | {"dropout": 0.3}, "train__micro_batch_size": 4, "train__steps": 3}
    changes |= {"mesh": {"data": 4, "tensor": 2}, "train__export": True}
    loop.run(config_of(workspace, tmp_path / "run", **changes))
    jax.effects_barrier()
    layers = json.loads((workspace / "model" / "config.json").read_text())["num_hidden_layers"]
    assert len(set(seen)) == 3 * 2 * layers * 2, "steps, micro-batches, layers, parameters"
    said = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert said["lora_dropout"] == 0.3


@pytest.fixture(scope="module", params=["pissa", "olora"])
def taken_apart(request, workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart") / "run"
    lora = ATTENTION | {"init": request.param}
    config = config_of(workspace, folder, adapter=lora, train__export="both")
    loop.run(config)
    return folder, lora


def test_a_base_without_a_part_resumes(taken_apart, workspace, tmp_path, monkeypatch):
    folder, lora = taken_apart
    config = config_of(workspace, tmp_path / "run", adapter=lora, train__export="both")
    run_until(config, 4, monkeypatch)
    loop.run(config)
    for name in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()
    assert cli(["export", str(folder), str(tmp_path / "adapter")]) == 0
    assert cli(["export", str(folder), str(tmp_path / "merged"), "--merged"]) == 0
    for ours, theirs in (("adapter", "export"), ("merged", "merged")):
        for path in (folder / theirs).iterdir():
            assert (tmp_path / ours / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_is_exported_for_the_unchanged_model(taken_apart, workspace, tmp_path):
    folder, _ = taken_apart
    said = json.loads((folder / "export" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (6, 14)
    assert cli(["merge", str(workspace / "model"), str(folder / "export"), str(tmp_path / "merged")]) == 0
    moved = 0.0
    for path in (folder / "merged").glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
        ours, before = load_file(path), load_file(workspace / "model" / path.name)
        for name in ours:
            moved = max(moved, float(np.abs(np.float32(ours[name]) - np.float32(before[name])).max()))
    assert 1e-3 < moved < 0.1, "training moved weights of a deviation of 0.02 a little"


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_it_resumes_on_quantised_weights(init, workspace, tmp_path, monkeypatch, capfd):
    changes = {
        "adapter": ATTENTION | {"init": init},
        "model": {"path": str(workspace / "model"), "quantization": "nf4"},
    }
    config = config_of(workspace, tmp_path / "run", **changes, train__export="both")
    run_until(config, 4, monkeypatch)
    loop.run(config)
    loop.run(config_of(workspace, tmp_path / "whole", **changes, train__export="both"))
    for name in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        ours, whole = (tmp_path / run / name for run in ("run", "whole"))
        assert ours.read_bytes() == whole.read_bytes(), name
    arguments = [
        "merge",
        str(workspace / "model"),
        str(tmp_path / "run" / "export"),
        str(tmp_path / "merged"),
    ]
    replayed = cli([*arguments, "--quantization"])
    told = capfd.readouterr().err
    if init == "loftq":  # its factors belong to the quantised weights
        assert replayed == 0
        for path in (tmp_path / "run" / "merged").glob("*.safetensors"):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
        assert cli([*arguments, "--overwrite"]) == 2
        assert "expected --quantization" in capfd.readouterr().err
    else:
        assert replayed == 2
        assert "cannot be done again" in told
    said = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert said["r"] == {"pissa": 6, "loftq": 3}[init]


def test_random_weights_without_a_part(workspace, tmp_path):
    raw = json.loads((workspace / "model" / "config.json").read_text())
    changes = {"model": {"config": raw, "dtype": "float32"}, "data__tokenizer": str(workspace / "model")}
    changes |= {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0, "train__steps": 2}
    for name, init in (("pissa", "pissa"), ("plain", "default")):
        loop.run(
            config_of(
                workspace,
                tmp_path / name,
                **changes,
                adapter=ATTENTION | {"init": init},
                train__export="merged",
            )
        )
    ours, theirs = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("pissa", "plain")
    )
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)


REFUSED = [
    ({"init": "pissa", **EXPERTS}, "in place of adapter.init 'pissa'"),
    ({"init": "olora", "rank": 999}, "has rank 999: expected at most its smaller side"),
    ({"init": "loftq"}, "found 'loftq' without model.quantization"),
    ({"dropout": 1.0}, "adapter.dropout"),
    ({"dropout": 0.1, "target_modules": ["lm_head"]}, "expected adapter.dropout 0"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_is_refused(changes, expected, workspace, tmp_path, capfd):
    refused(small(tmp_path, workspace, adapter=ATTENTION | changes), expected, capfd)


def test_what_is_not_quantised_loses_nothing(workspace, tmp_path, capfd):
    model = {"path": str(workspace / "model"), "quantization": "nf4"}
    lora = ATTENTION | {"init": "loftq", "target_modules": ["lm_head"]}
    refused(
        small(tmp_path, workspace, adapter=lora, model=model), "lm_head.weight is not held in few bits", capfd
    )
