"""What else lies in a folder: copied, left out, or called otherwise so that transformers finds it."""

import json
import os

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.exports import assert_same_files, files_of, stored_bytes

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop.saving import export_like_source
from jaxmoe.interop.storage.format import INDEX_FILE

FAMILIES = list(tiny.FAMILIES)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_other_files_are_copied_but_no_other_weights(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
    not_told = {".git/HEAD": b"ref", ".git/objects/pack/x.bin": b"any"}
    copied = {
        "README.md": b"# card \xff",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "assets/deep/picture.png": b"\x89PNG",
        "empty.txt": b"",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
    left_out = {
        "pytorch_model.bin": b"old weights",
        "consolidated.safetensors": (folders.source / "model-00001-of-00002.safetensors").read_bytes(),
        "original/consolidated.00.pth": b"old weights",
        "onnx/model.onnx": b"old weights",
        "tf_model.h5": b"old weights",
    }
    for name, content in (copied | left_out | not_told).items():
        (folders.source / name).parent.mkdir(parents=True, exist_ok=True)
        (folders.source / name).write_bytes(content)
    model = jaxmoe.from_pretrained(folders.source)
    assert export_like_source(model.pure_params(), model.source, folders.export) == sorted(left_out)
    unwritten = left_out.keys() | not_told.keys()
    assert set(files_of(folders.export)) == set(files_of(folders.source)) - unwritten
    for name in unwritten:
        (folders.source / name).unlink()
    assert_same_files(folders.source, folders.export)


def test_what_another_trainer_left_is_not_copied(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
    left_out = [
        "checkpoint-500/",
        "events.out.tfevents.1.host",
        "global_step20/",
        "latest",
        "linked/",
        "nowhere.txt",
        "optimizer.pt",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
        "pipe",
        "rng_state_0.pth",
        "runs/",
        "scheduler.pt",
        "tokenizer.model",
        "trainer_state.json",
        "training_args.bin",
        "zero_to_fp32.py",
    ]
    copied = [
        "all_results.json",
        "assets/latest.txt",
        "assets/runs/note.txt",
        "checkpoint-note.md",
        "link.txt",
    ]
    not_told = [".git", ".cache/huggingface/x.lock"]
    inside = ["checkpoint-500/config.json", "runs/Nov01/x", "global_step20/state.txt"]
    for name in [*left_out, *copied, *not_told, *inside]:
        path = folders.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "linked/":
            path.symlink_to(folders.source / "assets")
        elif name in ("link.txt", "nowhere.txt", "tokenizer.model"):
            path.symlink_to({"link.txt": "config.json", "tokenizer.model": "/dev/zero"}.get(name, "gone"))
        elif name == "pipe":
            os.mkfifo(path)
        elif not name.endswith("/"):
            path.write_text(name)
    model = jaxmoe.from_pretrained(folders.source)
    assert export_like_source(model.pure_params(), model.source, folders.export) == left_out
    assert set(files_of(folders.export)) == FILES | {"model.safetensors", *copied}
    assert not (folders.export / "link.txt").is_symlink()


def test_a_file_that_takes_another_ones_place_must_be_regular(folders):
    tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
    model = jaxmoe.from_pretrained(folders.source)
    pipe = folders.source.parent / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe: cannot be read: it is a named pipe, expected a regular file"):
        export_like_source(
            model.pure_params(), model.source, folders.export, replaced_files={"tokenizer.json": pipe}
        )


class TestFilesThatTransformersWouldNotFind:
    """jaxmoe reads such folders; their exports have the same tensors where transformers looks for them."""

    def exported(self, folders):
        model = jaxmoe.from_pretrained(folders.source)
        jaxmoe.save_pretrained(model, folders.export)
        assert stored_bytes(folders.export) == stored_bytes(folders.source)
        again = jaxmoe.from_pretrained(folders.export)
        jax.tree.map(np.testing.assert_array_equal, again.pure_params(), model.pure_params())

    @pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "consolidated.safetensors"])
    def test_one_file_of_another_name(self, folders, name):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=1)
        before = (folders.source / "model.safetensors").read_bytes()
        (folders.source / "model.safetensors").rename(folders.source / name)
        self.exported(folders)
        assert set(files_of(folders.export)) == FILES | {"model.safetensors"}
        assert (folders.export / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("metadata", ["none", None, [], "text"])
    def test_an_index_without_metadata(self, folders, metadata):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        index = json.loads((folders.source / INDEX_FILE).read_text())
        total = index.pop("metadata")["total_size"]
        if metadata != "none":
            index["metadata"] = metadata
        (folders.source / INDEX_FILE).write_text(json.dumps(index))
        self.exported(folders)
        written = json.loads((folders.export / INDEX_FILE).read_text())
        assert written["weight_map"] == index["weight_map"]
        assert written["metadata"]["total_size"] == total
        for file in folders.source.glob("*.safetensors"):
            assert (folders.export / file.name).read_bytes() == file.read_bytes()

    def test_model_safetensors_as_one_of_several(self, folders):
        """transformers would load it alone, and draw the other weights at random."""
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
        (folders.source / second).rename(folders.source / "model.safetensors")
        text = (folders.source / INDEX_FILE).read_text().replace(second, "model.safetensors")
        (folders.source / INDEX_FILE).write_text(text)
        self.exported(folders)
        assert set(files_of(folders.export)) == FILES | {INDEX_FILE, first, second}

    @pytest.mark.parametrize("spelling", ["deep/er/", "./deep//er/"])
    def test_shards_below_the_folder_stay_there(self, folders, spelling):
        tiny.write_checkpoint(folders.source, "mixtral", "bfloat16", shards=2)
        second = "model-00002-of-00002.safetensors"
        (folders.source / "deep" / "er").mkdir(parents=True)
        (folders.source / second).rename(folders.source / "deep" / "er" / second)
        text = (folders.source / INDEX_FILE).read_text().replace(second, spelling + second)
        (folders.source / INDEX_FILE).write_text(text)
        self.exported(folders)
        assert_same_files(folders.source, folders.export)


def test_tensors_beside_the_model_are_copied(folders):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tiny.write_checkpoint(folders.source, "mixtral", shards=1)
    tiny.write_tensors(folders.source, tensors | {name: np.arange(8, dtype=np.int64)})
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.export)
    assert_same_files(folders.source, folders.export)
    assert name in stored_bytes(folders.export)
