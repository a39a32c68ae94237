"""Runs with variants of low-rank adapters: what they resume to, and what they leave for PEFT."""

import json

import jax
import pytest
from helpers.runs import refused, run_config, run_until, small, write_workspace

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


REFUSED = [
    ({"dropout": 1.0}, "adapter.dropout"),
    ({"dropout": 0.1, "target_modules": ["lm_head"]}, "expected adapter.dropout 0"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_is_refused(changes, expected, workspace, tmp_path, capfd):
    refused(small(tmp_path, workspace, adapter=ATTENTION | changes), expected, capfd)
