"""Runs that train adapters: what they change, resume, and leave for PEFT."""

import json

import numpy as np
import pytest
from helpers import adapters
from helpers.runs import refused, run_config, run_until, small, write_workspace
from safetensors.numpy import load_file

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.run import loop

LORA = {
    "rank": 3,
    "alpha": 7,
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "learning_rate_ratio": 4,
}
ON_EIGHT = {"mesh": {"data": 2, "expert": 2, "tensor": 2}, "train__micro_batch_size": 8, "train__steps": 6, "optimizer__learning_rate": 0.02}


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
    own = [name for name in before if any(part in name for part in adapted) and "layers.0." in name]
    assert changed.issuperset(own)


@pytest.mark.torch
def test_peft_computes_what_was_trained(finished, workspace):
    """The export under PEFT, merged by PEFT, and our merged folder give the same logits."""
    import torch
    import transformers

    def base(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 90, (2, 19)))
    wrapped = adapters.load(base(workspace / "model"), finished[0] / "export")
    with torch.no_grad():
        plain = base(workspace / "model")(tokens).logits.numpy()
        theirs = wrapped(tokens).logits.numpy()
    assert np.abs(theirs - plain).max() > 0.02
    from jaxmoe.interop.pretrained import from_pretrained

    # In bfloat16 on disk, as the base is: merging rounds.
    ours = np.asarray(from_pretrained(finished[0] / "merged", dtype="float32")(tokens.numpy()))
    assert np.abs(ours - theirs).max() < 0.2 * np.abs(theirs - plain).max()
    with adapters.quiet(), torch.no_grad():
        bfloat = adapters.load(base(workspace / "model").to(torch.bfloat16), finished[0] / "export")
        merged = bfloat.merge_and_unload().to(torch.float32)(tokens).logits.numpy()
    np.testing.assert_allclose(ours, merged, atol=1e-4 * np.abs(merged).max())


def test_resume_is_exact(finished, workspace, tmp_path, monkeypatch):
    config = config_of(workspace, tmp_path / "run")
    run_until(config, 5, monkeypatch)
    loop.run(config)
    for name in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_checkpoints_hold_only_what_trains(finished, workspace):
    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    base = sum(path.stat().st_size for path in (workspace / "model").glob("*.safetensors"))
    trained = (finished[0] / "export" / "adapter_model.safetensors").stat().st_size
    assert size(finished[0] / "checkpoints" / "6") < 3.5 * trained + 20_000 < 4 * base


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
        assert np.abs(after[name] - array).max() < 0.5 * np.abs(array).max(), name


def test_merged_export_of_random_weights(workspace, tmp_path):
    from helpers import tiny

    raw = json.loads((workspace / "model" / "config.json").read_text())
    changes = {"model": {"config": raw, "dtype": "float32"}, "data__tokenizer": str(workspace / "model")}
    loop.run(config_of(workspace, tmp_path / "run", **changes, train__steps=1, train__export="merged"))
    assert (tmp_path / "run" / "export" / "config.json").exists()
    del tiny


REFUSED = [
    ({"adapter": {"target_modules": ["q_prj"]}}, "'q_prj' matches nothing: expected names such as model.layers.0.self_attn.q_proj"),
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
    from jaxmoe.parallel.sharding import make_mesh
    from jaxmoe.run.assemble import assemble
    import jax

    lora = {"rank": 4, "init": "orthogonal", "target_modules": ["q_proj", "lm_head"]}
    config = config_of(workspace, tmp_path, adapter=lora)
    assembled = assemble(config, make_mesh(devices=jax.devices()[:1]))
    adapter = assembled.adapted.adapter(jax.tree.map(np.asarray, assembled.initial_weights.make()), None)
    for pair in adapter.pairs.values():
        assert np.abs(pair.a).max() > 0.01 and np.abs(pair.b).max() > 0.01
        assert np.abs(pair.delta()).max() < 1e-6
