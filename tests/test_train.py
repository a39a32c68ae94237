"""The train command from end to end: what a run leaves, exact resumption, and what only training shows."""

import dataclasses
import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

import families
import numpy as np
import pytest
import yaml
from helpers import tiny
from helpers.runs import finish, refused, run_config, small, start, write_config, write_workspace
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.run import loop as trainer
from jaxmoe.run import memory
from jaxmoe.run.checkpoints import Checkpoints
from jaxmoe.run.folder import RunFolder
from jaxmoe.run.meter import Meter
from jaxmoe.run.programs import Programs

TIMES = {"seconds", "data_seconds", "tokens_per_second", "mfu"}


def metrics(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    """A run that nothing interrupted: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    out = finish(start(write_config(folder, run_config(workspace, folder / "run"))))
    return folder / "run", out


def test_run_folder(finished):
    output, printed = finished
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "export"} <= {
        path.name for path in output.iterdir()
    }
    steps = [record for record in metrics(output) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1, "it learns"
    assert {"learning_rate", "grad_norm", "aux_loss", "router/max_violation", "router/entropy"} <= steps[
        0
    ].keys()
    assert len(steps[0]["router/max_violation"]) == 2, "one figure for each of the two MoE layers"
    assert steps[0]["learning_rate"] == pytest.approx(0.0015)
    evaluations = [record for record in metrics(output) if "eval/bits_per_byte" in record]
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    for expected in ("held-out bits per byte", "unigram", "bigram", "first step after", "MFU"):
        assert expected in printed
    raw = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 for record in raw if "loss" in record)
    assert sorted(int(path.name) for path in (output / "checkpoints").iterdir()) == [9, 12]


def test_export_follows_the_source(workspace, finished):
    source, export = workspace / "model", finished[0] / "export"
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in export.iterdir())
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "generation_config.json"):
        assert (source / name).read_bytes() == (export / name).read_bytes()
    changed = 0
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(export / file.name)
        assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
            k: (v.dtype, v.shape) for k, v in after.items()
        }
        changed += sum(not np.array_equal(before[name], after[name]) for name in before)
    assert changed > 50


def test_starting_again_changes_nothing(workspace, finished, tmp_path):
    """A finished run that is started again only reports."""
    output, _ = finished

    def content() -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"
        }

    before = content()
    out = finish(start(write_config(tmp_path, run_config(workspace, output))))
    assert "held-out bits per byte" in out
    assert content() == before


def test_killed_and_resumed_is_bit_for_bit_the_same(workspace, finished, tmp_path):
    """kill -9 at random moments: after some steps, and at once (while it starts or saves)."""
    rng = random.Random(0)
    output = tmp_path / "run"
    config = write_config(tmp_path, run_config(workspace, output))
    for stop_after in sorted(rng.sample(range(1, 12), 4)):
        process = start(config)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            log = output / "metrics.jsonl"
            if log.exists() and any(f'"step": {step},' in log.read_text() for step in range(stop_after, 13)):
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out = finish(start(config))
    assert "resuming after step" in out or "starting" in out
    assert metrics(output) == metrics(finished[0])
    for file in sorted((finished[0] / "export").iterdir()):
        assert (output / "export" / file.name).read_bytes() == file.read_bytes(), file.name


def test_full_disk_keeps_the_previous_checkpoint(workspace, finished, tmp_path):
    """A limit on the size of files stands for a full disk: the next save fails, the one before stays valid."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, ignore=shutil.ignore_patterns("12", "export"))
    config = write_config(tmp_path, run_config(workspace, output))

    process = start(config, file_limit=60_000)  # half of its smallest part that is one file
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 2, out
    error = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, out
    assert "cannot write the checkpoint of step 12" in error[0]
    assert "step 9 is still valid" in error[0]
    assert "Traceback" not in out
    # Writes that were under way when one failed may still put files into the folder with a temporary name.
    assert [path.name for path in (output / "checkpoints").iterdir() if path.name.isdigit()] == ["9"]
    assert "resuming after step 9" in finish(start(config))
    assert sorted(int(path.name) for path in (output / "checkpoints").iterdir()) == [9, 12]
    assert metrics(output) == metrics(finished[0])


def test_random_weights_export_load_and_fine_tune(workspace, tmp_path, capfd):
    """Random weights, a tokenizer made from the data, export, and a second run that fine-tunes the export."""
    raw = families.config_json("mixtral", vocab_size=320, initializer_range=0.02)
    changes = {
        "model": {"config": raw, "dtype": "float32"},
        "data__tokenizer": {"train_bpe": 300},
        "sample": {"prompt": "w12 w13", "tokens": 5},
        "train__steps": 2,
        "mesh": {"data": 8},
        "train__batch_size": 16,
        "train__micro_batch_size": 8,
    }
    config = write_config(tmp_path, run_config(workspace, tmp_path / "first", **changes))
    assert cli(["train", str(config)]) == 0
    out = capfd.readouterr().out
    assert "w12 w13" in out
    changes |= {"model": {"path": str(tmp_path / "first" / "export"), "dtype": "float32"}, "sample": None}
    changes |= {"data__tokenizer": None}
    config = write_config(tmp_path, run_config(workspace, tmp_path / "second", **changes))
    assert cli(["train", str(config)]) == 0
    capfd.readouterr()
    for run in ("first", "second"):
        names = {path.name for path in (tmp_path / run / "export").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert cli(["export", str(tmp_path / "first"), str(tmp_path / "again")]) == 0
    for path in (tmp_path / "first" / "export").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert cli(["inspect", str(tmp_path / "second" / "export")]) == 0
    assert "12 experts of 28" in capfd.readouterr().out
    assert (
        cli(["generate", str(tmp_path / "second" / "export"), "w12", "--tokens", "3", "--dtype", "float32"])
        == 0
    )
    assert capfd.readouterr().out.startswith("w12")


def test_folder_of_another_run(finished, workspace, tmp_path, capfd):
    changes = {"mesh": {"data": 8}, "train__micro_batch_size": 8}
    config = write_config(tmp_path, run_config(workspace, finished[0], **changes))
    refused(config, "holds another run", capfd)
    refused(config, "train.seed is 0 there and 9 here", capfd, "train.seed=9")


def test_the_corrected_command_works_in_the_same_folder(workspace, tmp_path, capfd, monkeypatch):
    """The nan is found only once the weights are read, when the run's folder is there."""
    tensors = tiny.write_checkpoint(tmp_path / "model", "qwen3_moe", dtype="bfloat16", shards=1)
    tensors["model.norm.weight"] = np.full(40, np.nan, np.float32)
    tiny.write_tensors(tmp_path / "model", tensors, 1)
    config = small(tmp_path, workspace, model__path=str(tmp_path / "model"))
    assert cli(["train", str(config)]) == 2
    assert (
        f"error: {tmp_path}/model: found nan or infinity in norm, expected finite" in capfd.readouterr().err
    )
    assert (tmp_path / "run" / "config.yaml").exists()
    monkeypatch.setattr(trainer.Trainer, "run", lambda _: None)
    assert cli(["train", str(config), f"model.path={workspace / 'model'}", "train.seed=5"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["seed"] == 5


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_one_document_are_trained_as_such(workspace, tmp_path, packing):
    config = RunConfig.from_mapping(
        yaml.safe_load(small(tmp_path, workspace, data__packing=packing).read_text())
    )
    assembled, data = opened(config)
    with RunFolder.open(config) as folder:
        one = trainer.Trainer(assembled, folder, data, Programs(assembled), Meter(assembled))
    assert one.assembled.step_spec.packed is packing


def opened(config):
    assembled = trainer._assemble(config)
    return assembled, trainer._open_data(assembled)


def reported(workspace, folder, number, **figures):
    """The message about one step whose metrics are as given."""
    config = RunConfig.from_mapping(yaml.safe_load(small(folder, workspace).read_text()))
    assembled, data = opened(config)
    with RunFolder.open(config) as run_folder:
        one = trainer.Trainer(assembled, run_folder, data, Programs(assembled), Meter(assembled))
        with pytest.raises(UserError) as caught:
            one._report(number, False, {"loss": 0.0, "grad_norm": 0.0, "targets": 9.0} | figures, {}, None)
        one.checkpoints.close()
    return str(caught.value)


def test_what_is_seldom_meant_is_said_before_the_first_step(workspace, tmp_path, monkeypatch, capfd):
    class StoppedError(Exception):
        pass

    def stop(_):
        raise StoppedError

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(104)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = {"data__tokenizer": str(tmp_path / "tokenizer.json"), "data__sequence_length": 500}
    config = RunConfig.from_mapping(yaml.safe_load(small(tmp_path, workspace, **given).read_text()))
    assembled, data = opened(config)
    positions = assembled.source.raw["max_position_embeddings"]
    assert positions < 500
    with RunFolder.open(config) as folder:
        one = trainer.Trainer(assembled, folder, data, Programs(assembled), Meter(assembled))
        monkeypatch.setattr(trainer.Trainer, "_compiled", stop)
        with pytest.raises(StoppedError):
            one.run()
    assert [line[:60] for line in capfd.readouterr().out.splitlines()[1:]] == [
        f"warning: data.sequence_length is 500 and the model's max_position_embeddings {positions}: it"[:60],
        "warning: the tokenizer has no end-of-text token: nothing tells the model"[:60],
    ]
    assert data.doubts({"text_config": {"max_position_embeddings": 499}}) == data.doubts(
        {"max_position_embeddings": 499}
    )
    assert len(data.doubts({"thinker_config": {"text_config": {"max_position_embeddings": 500}}})) == 1
    assert dataclasses.replace(data, eos=0).doubts({}) == []


def test_a_step_without_a_token_to_predict(workspace, tmp_path):
    told = reported(workspace, tmp_path, 2, targets=0.0)
    assert told.startswith("data: none of the 8 sequences of step 2 has a token to predict")


def test_the_first_step_is_not_blamed_on_the_learning_rate(workspace, tmp_path):
    told = reported(workspace, tmp_path / "first", 1, loss=math.nan)
    assert told.startswith("step 1 has loss nan and gradient norm 0.0 before anything was trained")
    assert "learning_rate" not in told
    told = reported(workspace, tmp_path / "second", 2, grad_norm=math.inf)
    assert "lower optimizer.learning_rate" in told
    assert told.endswith("(no step is checkpointed)")


def test_weights_that_are_not_finite_are_never_written(workspace, tmp_path, capfd):
    """The loss of a step is that of before its update: the last update is seen in the weights alone."""
    config = small(
        tmp_path, workspace, train__export=True, train__checkpoint_every=1, optimizer__weight_decay=100.0
    )
    assert (
        cli(
            [
                "train",
                str(config),
                "train.steps=1",
                "optimizer.warmup_steps=0",
                "optimizer.learning_rate=3e38",
            ]
        )
        == 2
    )
    err = capfd.readouterr().err
    assert err.startswith("error: training diverged: step 1 left nan or infinity in ")
    assert err.endswith("(no step is checkpointed)\n")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "export").exists()
    assert Checkpoints(tmp_path / "run" / "checkpoints", None).steps() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.sequence_length=1048576", "a training step needs at least "),
        ("data.sequence_length=16384", "for what it computes on the way)"),
    ],
)
def test_memory_that_a_step_needs_and_is_not_there(workspace, tmp_path, capfd, monkeypatch, change, told):
    """What a machine has is given here; what is needed is counted, or told by the compiler."""
    monkeypatch.setattr(memory, "_machine_bytes", lambda: [2 * 10**9])
    config = small(tmp_path, workspace, data__eval_fraction=0.0)
    assert cli(["train", str(config), "train.eval_every=null", change]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: out of memory: ")
    assert told in err
    assert err.endswith(f"lower data.sequence_length (now {change.partition('=')[2]})\n")
    assert len(err.splitlines()) == 1


def test_memory_that_runs_out_while_training(workspace, tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(trainer.Trainer, "_compiled", lambda _: None)
    monkeypatch.setattr(trainer.Trainer, "_start", fail)
    assert cli(["train", str(small(tmp_path, workspace))]) == 2
    told = "error: out of memory (Unable to allocate 9 TiB): lower data.sequence_length (now 24)"
    assert capfd.readouterr().err == f"{told}\n"
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert cli(["train", str(small(tmp_path, workspace))]) == 2
    assert capfd.readouterr().err == f"{told}, in a new output_dir\n"


@pytest.mark.torch
def test_a_multimodal_folder_trains_as_a_text_model(workspace, tmp_path):
    """Its towers, and constants of its layers, come out as they went in; all that is trained has moved."""
    import families

    families.torch_model("gemma4").save_pretrained(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", 104)
    config = run_config(
        workspace,
        tmp_path / "run",
        model__path=str(tmp_path / "model"),
        train__steps=2,
        optimizer__name="adamw",
        train__eval_every=None,
    )
    finish(start(write_config(tmp_path, config)))
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "model", tmp_path / "run" / "export")
    )
    assert before.keys() == after.keys()
    same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    beside = {name for name in before if "language_model" not in name}
    constants = {name for name in before if name.endswith("layer_scalar")}
    assert beside
    assert constants
    assert same == beside | constants
