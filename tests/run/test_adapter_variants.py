"""Runs with variants of low-rank adapters: what they resume to, and what they leave for PEFT."""

import itertools
import json

import jax
import numpy as np
import pytest
from helpers import adapters
from helpers.runs import refused, run_config, run_until, small, write_workspace
from safetensors.numpy import load_file

from jaxmoe.cli import main as cli
from jaxmoe.codecs import PACKED
from jaxmoe.config import RunConfig
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.source import open_source
from jaxmoe.model.dropout import Dropout
from jaxmoe.model.linear import LowRank, dense
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named
from jaxmoe.run import loop
from jaxmoe.run.assemble import assemble
from jaxmoe.run.exporting import export

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


def assert_resumes(folder, lora, workspace, tmp_path, monkeypatch):
    """A run that is stopped after 4 steps and goes on exports what the one in `folder` did."""
    config = config_of(workspace, tmp_path / "run", adapter=lora, train__export="both")
    run_until(config, 4, monkeypatch)
    loop.run(config)
    for name in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_a_base_without_a_part_resumes(taken_apart, workspace, tmp_path, monkeypatch):
    folder, lora = taken_apart
    assert_resumes(folder, lora, workspace, tmp_path, monkeypatch)
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


@pytest.mark.parametrize(
    ("variant", "rank"), [({"init": "pissa"}, 6), ({"init": "loftq"}, 3), ({"dora": True}, 3)]
)
def test_it_resumes_on_quantised_weights(variant, rank, workspace, tmp_path, monkeypatch, capfd):
    changes = {"adapter": ATTENTION | variant, "mesh": {"data": 4, "expert": 2}}
    changes |= {"model": {"path": str(workspace / "model"), "quantization": "nf4"}, "train__export": "both"}
    config = config_of(workspace, tmp_path / "run", **changes)
    run_until(config, 4, monkeypatch)
    loop.run(config)
    loop.run(config_of(workspace, tmp_path / "whole", **changes))
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
    if variant.get("init") != "pissa":
        assert replayed == 0
        for path in (tmp_path / "run" / "merged").glob("*.safetensors"):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
        # The factors of loftq belong to the quantised weights; others may be merged into the plain ones, with a line.
        assert cli([*arguments, "--overwrite"]) == (2 if variant.get("init") == "loftq" else 0)
        assert ("expected --quantization" in capfd.readouterr().err) == (variant.get("init") == "loftq")
    else:
        assert replayed == 2
        assert "cannot be done again" in told
    said = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert said["r"] == rank


BEGUN = [{"init": "pissa"}, {"dora": True}, {"init": "olora", "dora": True}]


@pytest.mark.parametrize(
    ("variant", "quantization"),
    [*itertools.product(BEGUN, [None, "nf4"]), ({"init": "loftq"}, "nf4")],
)
def test_merged_is_what_training_saw(variant, quantization, workspace, tmp_path):
    """Whatever the base was, and with an output head that is in no few bits."""
    modules = ["q_proj", *([] if variant.get("init") == "loftq" else ["lm_head"])]
    model = {"path": str(workspace / "model"), "dtype": "float32", "quantization": quantization}
    lora = ATTENTION | variant | {"target_modules": modules}
    config = config_of(workspace, tmp_path / "run", model=model, adapter=lora, mesh={})
    assembled = assemble(config, make_mesh(devices=jax.devices()[:1]))
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda trained, x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32) if trained else x,
        assembled.mask,
        assembled.initial_weights.make(),
    )
    export(assembled, assembled.begin(params), "merged", tmp_path / "merged")
    found = load_params(open_source(tmp_path / "merged").grouped(assembled.spec), np.float32)
    is_weight = lambda leaf: isinstance(leaf, (LowRank, *PACKED))
    for (name, ours), weight in zip(named(found), jax.tree.leaves(params, is_leaf=is_weight), strict=True):
        want = np.asarray(dense(weight, np.float32))  # the folder is in bfloat16
        np.testing.assert_allclose(ours, want, atol=0.005 * np.abs(want).max(), err_msg=name)


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


@pytest.fixture(scope="module")
def lengthened(workspace, tmp_path_factory):
    """A run with DoRA on attention and on the output head, with LoRA+."""
    folder = tmp_path_factory.mktemp("dora") / "run"
    lora = ATTENTION | {
        "dora": True,
        "learning_rate_ratio": 2,
        "target_modules": ["k_proj", "o_proj", "lm_head"],
    }
    loop.run(config_of(workspace, folder, adapter=lora, train__export="both"))
    return folder, lora


def test_lengths_train_and_resume(lengthened, workspace, tmp_path, monkeypatch):
    folder, lora = lengthened
    assert_resumes(folder, lora, workspace, tmp_path, monkeypatch)
    assert json.loads((folder / "export" / "adapter_config.json").read_text())["use_dora"] is True
    tensors, weights = load_file(folder / "export" / "adapter_model.safetensors"), {}
    for path in (workspace / "model").glob("*.safetensors"):
        weights |= load_file(path)
    lengths = {name: value for name, value in tensors.items() if name.endswith("lora_magnitude_vector")}
    assert len(lengths) == len(tensors) / 3 > 2
    for name, value in lengths.items():
        own = name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
        before = np.linalg.norm(np.float32(weights[own]), axis=1)
        assert 1e-3 < np.abs(value - before).max() < 0.2, name


@pytest.mark.torch
def test_peft_computes_what_was_trained_with_dora(lengthened, workspace):
    """PEFT loads the export, and merges it into the numbers of our merged folder."""
    import torch
    import transformers

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    wrapped = adapters.load(load(workspace / "model"), lengthened[0] / "export")
    with adapters.quiet():
        theirs = wrapped.merge_and_unload().state_dict()
    ours = load(lengthened[0] / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # PEFT rounds twice where we round once.
        atol = 0.005 * float(value.float().abs().max())
        np.testing.assert_allclose(ours[name].float(), value.float(), atol=atol, err_msg=name)


def test_going_on_with_dora(lengthened, workspace, tmp_path):
    """The first step starts where the other run ended, with its dropout or another."""
    given = {"path": str(lengthened[0] / "export")}
    changes = {"train__steps": 2, "optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    loop.run(config_of(workspace, tmp_path / "run", adapter=given, **changes))
    ours, theirs = (
        load_file(folder / "export" / "adapter_model.safetensors")
        for folder in (lengthened[0], tmp_path / "run")
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-6, atol=1e-9, err_msg=name)


def test_dora_of_random_weights_that_lost_a_part(workspace, tmp_path):
    """Magnitudes begin as the lengths of the whole weights: merged before anything was trained they are those."""
    raw = json.loads((workspace / "model" / "config.json").read_text())
    changes = {"model": {"config": raw, "dtype": "float32"}, "data__tokenizer": str(workspace / "model")}
    changes |= {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0, "train__steps": 2}
    for name, more in (("dora", {"init": "pissa", "dora": True}), ("plain", {})):
        loop.run(
            config_of(workspace, tmp_path / name, **changes, adapter=ATTENTION | more, train__export="merged")
        )
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("dora", "plain"))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)


REFUSED = [
    ({"dora": True, **EXPERTS}, "is no linear layer: expected adapter.dora false"),
    ({"dora": True, "target_modules": ["embed_tokens"]}, "is no linear layer: expected adapter.dora false"),
    (
        {"dora": True, "target_modules": ["mlp.gate_proj"]},
        "up_proj.weight is not, which is a part of the same",
    ),
    ({"init": "pissa", **EXPERTS}, "in place of adapter.init 'pissa'"),
    ({"init": "olora", "rank": 999}, "has rank 999: expected at most its smaller side"),
    ({"init": "loftq"}, "found 'loftq' without a model.quantization"),
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
