"""The train command refuses what a user gets wrong before anything is trained: one line, and no run folder."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from helpers.runs import refused, run_config, small, write_config, write_workspace
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from jaxmoe.cli import main as cli


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("train"))


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


def test_run_inside_the_model_folder(workspace, capfd, tmp_path):
    """All of the model's folder is exported: the run would copy itself."""
    changes = {"mesh": {"data": 8}, "train__micro_batch_size": 8}
    config = write_config(tmp_path, run_config(workspace, workspace / "model" / "run", **changes))
    refused(config, "lies inside the model's folder", capfd)


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
