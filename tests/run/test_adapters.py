"""Runs that train adapters: what they change, resume, and leave for PEFT."""

import json
import shutil

import numpy as np
import pytest
from helpers import adapters
from helpers.runs import refused, run_config, run_until, small, write_workspace
from safetensors.numpy import load_file

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.run import loop

LORA = {
    "rank": 3,
    "alpha": 7,
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "learning_rate_ratio": 4,
}
ON_EIGHT = {
    "mesh": {"data": 2, "expert": 2, "tensor": 2},
    "train__micro_batch_size": 8,
    "train__steps": 6,
    "optimizer__learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("adapters"))


def config_of(workspace, output, **changes) -> RunConfig:
    given = {"adapter": LORA, **ON_EIGHT, "train__export": "both"}
    return RunConfig.from_mapping(run_config(workspace, output, **(given | changes)))


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, loop.run(config_of(workspace, folder))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_an_adapter(finished):
    folder, result = finished
    heldout = [record["eval/bits_per_byte"] for record in records(folder) if "eval/bits_per_byte" in record]
    assert heldout[0] > heldout[-1] + 0.001
    assert result.export == folder / "export"
    assert {path.name for path in (folder / "export").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "export" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7, ["o_proj", "q_proj"])


def test_what_is_not_adapted_keeps_its_bytes(finished, workspace):
    before = {}
    for file in sorted((workspace / "model").glob("*.safetensors")):
        before |= load_file(file)
    after = {}
    for file in sorted((finished[0] / "merged").glob("*.safetensors")):
        after |= load_file(file)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed
    adapted = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mlp.gate.weight")
    assert all(any(part in name for part in adapted) for name in changed)
    own = [name for name in before if any(part in name for part in adapted) and "layers.1." in name]
    assert changed.issuperset(own)


@pytest.mark.torch
def test_peft_computes_what_was_trained(finished, workspace):
    """PEFT loads the export, and merges it into the numbers of our merged folder."""
    import torch
    import transformers

    from jaxmoe.interop.torch_bridge import to_numpy

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    wrapped = adapters.load(load(workspace / "model"), finished[0] / "export")
    with adapters.quiet():
        theirs = wrapped.merge_and_unload().state_dict()
    ours = load(finished[0] / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(to_numpy(ours[name]), to_numpy(value), err_msg=name)


def test_resume_is_exact(finished, workspace, tmp_path, monkeypatch):
    config = config_of(workspace, tmp_path / "run")
    run_until(config, 5, monkeypatch)
    loop.run(config)
    for name in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_checkpoints_hold_only_what_trains(finished):
    metadata = json.loads((finished[0] / "checkpoints" / "6" / "state" / "_METADATA").read_text())
    arrays = metadata["tree_metadata"].items()
    names = [name for name, array in arrays if array["value_metadata"]["value_type"] != "None"]
    assert any("'a'" in name for name in names)
    assert any("'b'" in name for name in names)
    assert not any("base" in name or "norm" in name or "k_proj" in name for name in names), names


def test_export_command(finished, tmp_path, capfd):
    folder = finished[0]
    assert cli(["export", str(folder), str(tmp_path / "adapter")]) == 0
    assert cli(["export", str(folder), str(tmp_path / "merged"), "--merged"]) == 0
    for ours, theirs in (("adapter", "export"), ("merged", "merged")):
        for path in (folder / theirs).iterdir():
            assert (tmp_path / ours / path.name).read_bytes() == path.read_bytes(), path.name
    assert cli(["export", str(folder), str(tmp_path / "other"), "--quantization", "source"]) == 2
    assert "the run has an adapter" in capfd.readouterr().err


def test_going_on_with_an_adapter(finished, workspace, tmp_path):
    """The first step starts where the other run ended."""
    given = {"path": str(finished[0] / "export"), "learning_rate_ratio": 4}
    config = config_of(workspace, tmp_path / "run", adapter=given, train__steps=2)
    loop.run(config)
    before = load_file(finished[0] / "export" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert np.corrcoef(after[name].ravel(), array.ravel())[0, 1] > 0.8, name


def test_merged_export_of_random_weights(workspace, tmp_path, capfd):
    """Without a folder to follow: the same numbers as the adapter on the export of the weights that it began with."""
    raw = json.loads((workspace / "model" / "config.json").read_text())
    changes = {"model": {"config": raw, "dtype": "float32"}, "data__tokenizer": str(workspace / "model")}
    changes |= {"train__steps": 2, "train__export": "both"}
    loop.run(config_of(workspace, tmp_path / "run", **changes))
    frozen = {
        "optimizer__learning_rate": 1e-30,
        "optimizer__weight_decay": 0.0,
        "train__export": True,
        "adapter": None,
    }
    loop.run(config_of(workspace, tmp_path / "base", **(changes | frozen)))
    assert cli(["merge", *(str(tmp_path / name) for name in ("base/export", "run/export", "merged"))]) == 0
    capfd.readouterr()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run/merged", "merged"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)


REFUSED = [
    ({"adapter": {"target_modules": ["q_prj"]}}, "'q_prj' matches nothing: expected names such as model.layers"),
    ({"adapter": {"rank": 3}}, "neither target_modules nor target_parameters"),
    ({"adapter": {"target_modules": ["norm"]}}, "no linear layer and no embedding"),
    ({"adapter": {"target_parameters": ["mlp.gate.weight"], "init": "orthogonal"}}, "is no linear layer"),
    ({"adapter": {"target_modules": ["q_proj"], "rank": 3, "init": "orthogonal"}}, "expected an even one"),
    ({"adapter": {"path": "nowhere"}}, "nowhere"),
    ({"adapter": {"path": "nowhere", "rank": 4}}, "which the adapter in that folder says itself"),
    ({"adapter": LORA, "trainable": ["norm"]}, "expected adapter.modules_to_save instead"),
    ({"train__export": "merged"}, "the run has no adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_is_refused(changes, expected, workspace, tmp_path, capfd):
    refused(small(tmp_path, workspace, **changes), expected, capfd)


def test_orthogonal_factors_begin_with_no_change(workspace, tmp_path):
    import jax

    from jaxmoe.parallel.sharding import make_mesh
    from jaxmoe.run.assemble import assemble

    lora = {"rank": 4, "init": "orthogonal", "target_modules": ["q_proj", "lm_head"]}
    config = config_of(workspace, tmp_path, adapter=lora)
    assembled = assemble(config, make_mesh(devices=jax.devices()[:1]))
    adapter = assembled.adapted.adapter(jax.tree.map(np.asarray, assembled.initial_weights.make()), None)
    for pair in adapter.pairs.values():
        assert np.abs(pair.a).max() > 0.01
        assert np.abs(pair.b).max() > 0.01
        assert np.abs(pair.delta()).max() < 1e-6


def test_another_export_of_a_finished_run(finished, tmp_path):
    """`train.export` may change, but a folder that is there keeps what it has."""
    from jaxmoe.run.exporting import holds

    folder = finished[0]
    assert holds("adapter", folder / "export")
    assert holds("merged", folder / "merged")
    assert not holds("merged", tmp_path / "nothing")
    with pytest.raises(UserError, match="holds an adapter, and train.export now asks for merged"):
        holds("merged", folder / "export")


def test_an_export_replaces_neither_model_nor_adapter(finished, workspace, tmp_path, capfd):
    given = {"path": str(finished[0] / "export")}
    loop.run(config_of(workspace, tmp_path / "run", adapter=given, train__steps=2, train__export=False))
    for taken in (workspace / "model", finished[0] / "export"):
        before = {path.name: path.read_bytes() for path in taken.iterdir()}
        assert cli(["export", str(tmp_path / "run"), str(taken), "--overwrite"]) == 2
        assert "export to another one" in capfd.readouterr().err
        assert {path.name: path.read_bytes() for path in taken.iterdir()} == before


def test_an_adapter_that_changed_is_noticed(finished, workspace, tmp_path):
    shutil.copytree(finished[0] / "export", tmp_path / "adapter")
    changes = {
        "adapter": {"path": str(tmp_path / "adapter")},
        "train__export": False,
        "train__checkpoint_every": 1,
    }
    loop.run(config_of(workspace, tmp_path / "run", **changes, train__steps=2))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    assert cli(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2


def test_merged_export_of_random_weights_in_few_bits(workspace, tmp_path):
    raw = json.loads((workspace / "model" / "config.json").read_text())
    model = {"config": raw, "dtype": "float32", "quantization": "int8"}
    changes = {
        "model": model,
        "data__tokenizer": str(workspace / "model"),
        "adapter": {"target_modules": ["q_proj"]},
    }
    loop.run(config_of(workspace, tmp_path / "run", **changes, train__steps=2, train__export="merged"))
    found = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(np.isfinite(array).all() for array in found.values())
    assert any("k_proj" in name for name in found)
