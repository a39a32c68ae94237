"""The train command from end to end: what a run leaves, exact resumption, and what a user gets wrong."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import tiny
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.run import loop as trainer
from jaxmoe.run import meter as throughput
from jaxmoe.run.folder import RunFolder

TIMES = {"seconds", "tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A checkpoint of a tiny Qwen3-MoE in two files, and text for its tokenizer of words w3 … w103."""
    folder = tmp_path_factory.mktemp("train")
    tiny.write_checkpoint(folder / "model", "qwen3_moe", dtype="bfloat16", shards=2, initializer_range=0.02)
    rng = random.Random(0)
    (folder / "text").mkdir()
    for part in range(3):
        lines = [
            " ".join(f"w{3 + int(rng.triangular(0, 100, 9))}" for _ in range(rng.randint(5, 60)))
            for _ in range(40)
        ]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / "text" / f"part{part}.jsonl").write_text(text)
    return folder


def run_config(workspace: Path, output: Path, **changes) -> dict:
    config = {
        "model": {"path": str(workspace / "model"), "dtype": "float32"},
        "data": {"path": str(workspace / "text"), "sequence_length": 24, "eval_fraction": 0.1},
        "optimizer": {"name": "muon", "learning_rate": 0.003, "warmup_steps": 2},
        "balance": {"aux_loss": 0.01},
        "train": {
            "steps": 12,
            "batch_size": 8,
            "micro_batch_size": 4,
            "checkpoint_every": 3,
            "log_every": 1,
            "eval_every": 4,
            "peak_tflops": 1.0,
        },
        "output_dir": str(output),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config.setdefault(section, {})[name] = value
        else:
            config[section] = value
    return config


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# Stands for a full disk: no file may grow past argv[1] bytes.
LIMITED = """
import resource, runpy, signal, sys
limit = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("jaxmoe.train", run_name="__main__")
"""


def start(config: Path, *overrides: str, file_limit: int | None = None) -> subprocess.Popen:
    """The command in a process of its own, on one device."""
    # Optimising takes longer than the code then runs; the runs inside pytest are optimised.
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    program = ["-m", "jaxmoe.train"] if file_limit is None else ["-c", LIMITED, str(file_limit)]
    return subprocess.Popen(
        [sys.executable, *program, str(config), *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=config.parent,
    )


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def metrics(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


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
    raw = tiny.config_json("mixtral", vocab_size=320, initializer_range=0.02)
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


def truncate(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(b"\xff" * 40 + file.read_bytes()[40:])


def rewrite_tensors(change):
    def damage(folder):
        tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
            file.unlink()
        change(tensors)
        (folder / "model.safetensors.index.json").unlink()
        tiny.write_tensors(folder, tensors)

    return damage


def edit_config(**fields):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


BAD_MODELS = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors",
    ),
    "truncated": (truncate, "model-00001-of-00002.safetensors"),
    "corrupt": (corrupt, "model-00001-of-00002.safetensors"),
    "wrong shape": (
        rewrite_tensors(lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)})),
        "model.norm.weight has shape [7], expected [40]",
    ),
    "wrong dtype": (
        rewrite_tensors(lambda t: t.update({"model.norm.weight": np.ones(40, np.int64)})),
        "model.norm.weight has dtype I64",
    ),
    "missing tensor": (
        rewrite_tensors(lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight")),
        "model.layers.1.mlp.experts.7.up_proj.weight is missing",
    ),
    "surplus tensor": (
        rewrite_tensors(lambda t: t.update({"model.layers.9.extra": np.ones(3, np.float32)})),
        "model.layers.9.extra is not part of the model",
    ),
    "unknown model_type": (edit_config(model_type="qwen9_moe"), "supported: afmoe, aria, "),
    "unknown field": (edit_config(norm_topk_probs=True), "did you mean 'norm_topk_prob'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(case, tmp_path, workspace, capfd):
    damage, expected = BAD_MODELS[case]
    model = tmp_path / "model"
    tiny.write_checkpoint(model, "qwen3_moe", shards=2)
    damage(model)
    changes = {"model__path": str(model), "mesh": {"data": 8}, "train__micro_batch_size": 8}
    refused(write_config(tmp_path, run_config(workspace, tmp_path / "run", **changes)), expected, capfd)


def refused(config: Path, expected: str, capfd, *overrides: str) -> None:
    """Exit code 2, one line with `expected` in it, no traceback, and no run folder."""
    output = Path(yaml.safe_load(config.read_text())["output_dir"])
    existed = output.exists()
    assert cli(["train", str(config), *overrides]) == 2
    out, err = capfd.readouterr()
    assert err.count("error: ") == 1, err
    assert len(err.strip().splitlines()) == 1, err
    assert expected in err
    assert "Traceback" not in out + err
    assert output.exists() == existed, "nothing is left of a run that did not begin"


BAD_DATA = {
    "empty file": ({"data.jsonl": b""}, "data.jsonl"),
    "not UTF-8": ({"data.txt": b"good text \xff\xfe and more"}, "data.txt"),
    "no field": ({"data.jsonl": b'{"txet": "a"}\n'}, "text"),
    "nothing to read": ({"data.csv": b"a,b"}, ".jsonl"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, tmp_path, workspace, capfd):
    files, expected = BAD_DATA[case]
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).write_bytes(content)
    changes = {"data__path": str(tmp_path / "text"), "mesh": {"data": 8}, "train__micro_batch_size": 8}
    refused(write_config(tmp_path, run_config(workspace, tmp_path / "run", **changes)), expected, capfd)


BAD_VALUES = [
    ("model.path=/no/such/folder", "/no/such/folder"),
    ("optimizer.learning_rat=1", "did you mean"),
    ("train.steps=many", "train.steps"),
    ("train.batch_size=12", "train.batch_size"),
    ("mesh.fsdp=3", "mesh"),
    ("mesh.expert=2", "8"),
    ("data.path=/no/such/text", "/no/such/text"),
    ("data.tokenizer={train_bpe: 5000}", "vocab_size is 104"),
    ("model.dtype=float8", "float8"),
]


@pytest.mark.parametrize(("override", "expected"), BAD_VALUES)
def test_bad_value(override, expected, tmp_path, workspace, capfd):
    changes = {"mesh": {"data": 8}, "train__micro_batch_size": 8}
    refused(
        write_config(tmp_path, run_config(workspace, tmp_path / "run", **changes)), expected, capfd, override
    )


def test_tokenizer_with_gaps_in_its_ids(workspace, tmp_path, capfd):
    """Three tokens are few, but one of them has an id that the model has no embedding for."""
    tokenizer = Tokenizer(models.WordLevel({"w3": 0, "w4": 1, "<unk>": 104}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    changes = {
        "mesh": {"data": 8},
        "train__micro_batch_size": 8,
        "data__tokenizer": str(tmp_path / "tokenizer.json"),
    }
    config = write_config(tmp_path, run_config(workspace, tmp_path / "run", **changes))
    refused(config, "its largest token id is 104 but the model's vocab_size is 104", capfd)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peak_by_the_name_of_the_device(kind, tflops, monkeypatch):
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(throughput.jax, "devices", lambda: [device])
    assert throughput.peak_flops("bfloat16") == (tflops * 1e12, f"{kind}, datasheet")


def test_a_name_never_stands_before_one_that_it_is_part_of():
    names = list(throughput.PEAK_TFLOPS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_folder_of_another_run(finished, workspace, tmp_path, capfd):
    changes = {"mesh": {"data": 8}, "train__micro_batch_size": 8}
    config = write_config(tmp_path, run_config(workspace, finished[0], **changes))
    refused(config, "holds another run", capfd)
    refused(config, "train.seed is 0 there and 9 here", capfd, "train.seed=9")


def test_run_inside_the_model_folder(workspace, capfd, tmp_path):
    """All of the model's folder is exported: the run would copy itself."""
    changes = {"mesh": {"data": 8}, "train__micro_batch_size": 8}
    config = write_config(tmp_path, run_config(workspace, workspace / "model" / "run", **changes))
    refused(config, "lies inside the model's folder", capfd)


def small(folder: Path, workspace: Path, **changes) -> Path:
    """The config file of a run of two steps on the eight devices of this process."""
    given = {"mesh": {"data": 8}, "train__micro_batch_size": 8, "train__steps": 2, "train__export": False}
    return write_config(folder, run_config(workspace, folder / "run", **(given | changes)))


def test_tied_copies_that_differ_are_found_before_the_folder_is_made(workspace, tmp_path, capfd):
    tensors = tiny.write_checkpoint(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True, shards=1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tiny.write_tensors(tmp_path / "model", tensors, 1)
    config = small(tmp_path, workspace, model__path=str(tmp_path / "model"))
    refused(config, "ties lm_head.weight to model.embed_tokens.weight", capfd)


def test_held_out_text_without_a_token_to_predict_is_found_before_training(workspace, tmp_path, capfd):
    (tmp_path / "heldout.txt").write_text("w5")
    tokenizer = Tokenizer(models.WordLevel({"w5": 0, "<unk>": 1}, unk_token="<unk>"))  # no BOS, no EOS
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    changes = {
        "data__eval_path": str(tmp_path / "heldout.txt"),
        "data__eval_fraction": 0.0,
        "data__tokenizer": str(tmp_path / "tokenizer.json"),
    }
    refused(small(tmp_path, workspace, **changes), "held-out documents leave no token to predict", capfd)


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
    mesh, model, data = trainer._open(config)
    with RunFolder.open(config) as folder:
        one = trainer.Trainer(config, folder, model, data, mesh)
    assert one.step_spec.packed is packing


def test_an_output_dir_that_cannot_be(workspace, tmp_path, capfd):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    config = write_config(tmp_path, run_config(workspace, tmp_path / "loop" / "run", mesh={"data": 8}))
    refused(config, "which is no usable path (Too many levels of symbolic links)", capfd)


def test_arguments_that_are_none(capfd, tmp_path):
    for command in (["train", "optimizer.learning_rate=" + "1" * 300], ["inspect", "m" * 300]):
        assert cli(command) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    assert cli(["train", "--no-such-flag"]) == 2
    assert capfd.readouterr().err.startswith("error: unrecognized arguments: --no-such-flag")
    assert cli(["inspect"]) == 2
    assert capfd.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_the_installed_jax_lacks(workspace, tmp_path, platform):
    done = subprocess.run(
        [sys.executable, "-m", "jaxmoe.train", str(small(tmp_path, workspace))],
        env=dict(os.environ, JAX_PLATFORMS=platform),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: the environment has JAX_PLATFORMS = '{platform}' and the installed"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def reported(workspace, folder, number, **figures):
    """The message about one step whose metrics are as given."""
    config = RunConfig.from_mapping(yaml.safe_load(small(folder, workspace).read_text()))
    mesh, model, data = trainer._open(config)
    with RunFolder.open(config) as run_folder:
        one = trainer.Trainer(config, run_folder, model, data, mesh)
        with pytest.raises(UserError) as caught:
            one._report(number, False, {"loss": 0.0, "grad_norm": 0.0, "targets": 9.0} | figures, {}, None)
        one.checkpoints.close()
    return str(caught.value)


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
    command = [sys.executable, "-m", "jaxmoe.train", str(write_config(tmp_path, config))]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
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
