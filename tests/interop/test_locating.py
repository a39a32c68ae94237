"""Folders that look like a model and are none: the message says what they are."""

import json
import os
import shutil

import pytest
from helpers import tiny

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.source import open_source

pytestmark = pytest.mark.once  # names of files

ADAPTER = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}),
    "adapter_model.safetensors": "any",
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def refusal(folder):
    with pytest.raises(UserError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


class TestAdapter:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize(
        ("names", "told"),
        [
            (
                ["adapter_config.json", "adapter_model.safetensors"],
                "(adapter_config.json, adapter_model.safetensors) of 'org/base'",
            ),
            (["adapter_config.json"], "(adapter_config.json) of 'org/base'"),
            (["adapter_model.safetensors"], "(adapter_model.safetensors)"),
            (["adapter_model.bin"], "(adapter_model.bin)"),
        ],
    )
    def test_beside_a_model(self, folder, shards, names, told):
        tiny.write_checkpoint(folder, "mixtral", shards=shards)
        open_source(folder)
        for name in names:
            (folder / name).write_text(ADAPTER.get(name, "any"))
        assert refusal(folder) == (
            f"{folder}: holds a PEFT adapter {told} beside the model, which would not be applied; merge it into the "
            "model (PEFT: merge_and_unload, save_pretrained) and give the result, or move the adapter's files out of "
            "the folder"
        )

    @pytest.mark.parametrize("names", [ADAPTER, ["adapter_config.json"]])
    def test_alone(self, folder, names):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(ADAPTER[name])
        message = refusal(folder)
        assert f"{folder}: is a PEFT adapter (adapter_config.json" in message
        assert ") of 'org/base' and no model, expected a folder with config.json; merge it" in message

    @pytest.mark.parametrize(
        "config",
        [
            "",
            "[1]",
            '{"base_model_name_or_path": 5}',
            None,
            pytest.param("[" * 100_000, id="deep"),
            pytest.param("\0" * (2 << 20), id="large"),
        ],
    )
    def test_whose_config_says_nothing(self, folder, config):
        folder.mkdir()
        if config is None:
            os.mkfifo(folder / "adapter_config.json")
        else:
            (folder / "adapter_config.json").write_text(config)
        assert "is a PEFT adapter (adapter_config.json) and no model" in refusal(folder)

    def test_in_a_folder_below_is_none_of_the_model(self, folder):
        tiny.write_checkpoint(folder, "mixtral", shards=1)
        (folder / "other").mkdir()
        (folder / "other" / "adapter_config.json").write_text("{}")
        open_source(folder)


class TestCacheOfTheHub:
    def test_snapshots_are_named(self, tmp_path):
        cache = tmp_path / "models--org--name"
        snapshot = cache / "snapshots" / "0123abc"
        tiny.write_checkpoint(tmp_path / "made", "mixtral", shards=1)
        (cache / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted((tmp_path / "made").iterdir())):
            shutil.move(file, cache / "blobs" / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        assert refusal(cache) == (
            f"{cache}: is a folder of the hub's cache and no model, expected one of its snapshots; give {snapshot}"
        )
        assert open_source(snapshot).spec.width == 40
        model = jaxmoe.from_pretrained(snapshot)
        jaxmoe.save_pretrained(model, tmp_path / "export")
        for file in snapshot.iterdir():
            assert not (tmp_path / "export" / file.name).is_symlink()
            assert (tmp_path / "export" / file.name).read_bytes() == file.read_bytes()

    def test_without_any(self, tmp_path):
        (tmp_path / "snapshots").mkdir()
        assert "give snapshots/, which is empty: download the model again" in refusal(tmp_path)


def test_a_config_that_cannot_be_reached(folder):
    folder.mkdir()
    (folder / "config.json").symlink_to("config.json")
    assert f"found '{folder / 'config.json'}', which is no usable path (Too many levels" in refusal(folder)
