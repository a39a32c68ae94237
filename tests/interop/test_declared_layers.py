"""Layers for multi-token prediction that config.json counts: kept where they are there, told of where they are not."""

import json

import families
import numpy as np
import pytest
from helpers.runs import small, write_workspace
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.cli import main as cli
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.peft.merged import merge_folder
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.source import config_source

TOLD = "without tensors of such layers"

# A count beside the text model's own fields, and the name of a tensor of such a layer; {L} is the number of layers.
COUNTS = {
    "deepseek_v3": ({"num_nextn_predict_layers": 1}, "model.layers.{L}.eh_proj.weight"),
    "glm4v_moe": ({"num_nextn_predict_layers": 1}, "model.language_model.layers.{L}.eh_proj.weight"),
    "minimax_m2": ({"num_mtp_modules": 2}, "model.layers.{L}.eh_proj.weight"),
    "ernie4_5_moe": ({"num_nextn_predict_layers": 1}, "model.mtp_block.0.weight"),
    "qwen3_5_moe": ({"mtp_num_hidden_layers": 1}, "mtp.fc.weight"),
    "exaone_moe": ({"num_nextn_predict_layers": 1}, "mtp.fc.weight"),
}


def counted(name):
    """A config.json that counts such layers."""
    fields = COUNTS[name][0]
    return FAMILIES[name].with_fields(families.config_json(name), fields)


def folder_of(name, folder, *, with_layers):
    """Of a new model, with or without a tensor of such a layer."""
    model = from_config(families.config_json(name), dtype="float32")
    jaxmoe.save_pretrained(model, folder)
    config = {**counted(name), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    if with_layers:
        tensors = load_file(folder / "model.safetensors")
        tensors[COUNTS[name][1].replace("{L}", str(len(model.spec.layers)))] = np.ones((3, 5), np.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_there_is_kept(name, tmp_path, caplog):
    base = folder_of(name, tmp_path / "base", with_layers=True)
    for mtp in ("declared", "present"):
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(base, "float32"), tmp_path / mtp, mtp=mtp)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / mtp / file).read_bytes() == (base / file).read_bytes()
    assert TOLD not in caplog.text


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_not_there_is_told_and_can_be_mended(name, tmp_path, caplog):
    base = folder_of(name, tmp_path / "base", with_layers=False)
    model = jaxmoe.from_pretrained(base, "float32")
    assert TOLD not in caplog.text
    jaxmoe.save_pretrained(model, tmp_path / "declared")
    (field, count), *_ = COUNTS[name][0].items()
    assert f"config.json says {field} = {count}" in caplog.text
    assert (tmp_path / "declared/config.json").read_bytes() == (base / "config.json").read_bytes()
    caplog.clear()
    jaxmoe.save_pretrained(model, tmp_path / "present", mtp="present")
    assert TOLD not in caplog.text
    mended = FAMILIES[name].with_fields(config_of(base), {field: 0})
    assert config_of(tmp_path / "present") == mended != config_of(base)
    assert config_source(tmp_path / "present/config.json").lacking == {}


def test_new_models(tmp_path, caplog):
    model = from_config(counted("deepseek_v3"), dtype="float32")
    jaxmoe.save_pretrained(model, tmp_path / "declared")
    assert TOLD in caplog.text
    jaxmoe.save_pretrained(model, tmp_path / "present", mtp="present")
    counts = [config_of(tmp_path / name)["num_nextn_predict_layers"] for name in ("declared", "present")]
    assert counts == [1, 0]


@pytest.mark.parametrize("mtp", ["declared", "present"])
def test_merge(mtp, tmp_path, caplog):
    """The command, with an adapter that changes nothing."""
    base = folder_of("deepseek_v3", tmp_path / "base", with_layers=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    source = config_source(base / "config.json")
    module = "base_model.model.model.layers.{}.self_attn.o_proj.lora_{}.weight"
    of_width = (
        source.spec.width,
        source.spec.layers[0].mixer.num_heads * source.spec.layers[0].mixer.value_dim,
    )
    pairs = {}
    for layer in range(len(source.spec.layers)):
        pairs[module.format(layer, "A")] = np.zeros((2, of_width[1]), np.float32)
        pairs[module.format(layer, "B")] = np.zeros((of_width[0], 2), np.float32)
    save_file(pairs, adapter / "adapter_model.safetensors")
    merge_folder(base, adapter, tmp_path / "merged", mtp=mtp)
    assert (TOLD in caplog.text) == (mtp == "declared")
    assert config_of(tmp_path / "merged")["num_nextn_predict_layers"] == (mtp == "declared")
    assert cli(["merge", str(base), str(adapter), str(tmp_path / "again"), "--mtp", mtp]) == 0
    assert config_of(tmp_path / "again") == config_of(tmp_path / "merged")


def test_runs(tmp_path, capfd):
    """A run's export as its config says, and one that says otherwise."""
    raw = families.config_json(
        "deepseek_v3", vocab_size=320, num_hidden_layers=2, initializer_range=0.02, num_nextn_predict_layers=1
    )
    changes = {
        "model": {"config": raw, "dtype": "float32"},
        "data__tokenizer": {"train_bpe": 300},
        "train__export_mtp": "present",
        "train__export": True,
    }
    assert cli(["train", str(small(tmp_path, write_workspace(tmp_path), **changes))]) == 0
    assert config_of(tmp_path / "run/export")["num_nextn_predict_layers"] == 0
    assert cli(["export", str(tmp_path / "run"), str(tmp_path / "other"), "--mtp", "declared"]) == 0
    assert config_of(tmp_path / "other")["num_nextn_predict_layers"] == 1
    assert TOLD in capfd.readouterr().err
