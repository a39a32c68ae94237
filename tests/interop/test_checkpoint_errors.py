"""Checkpoints that cannot be loaded: the message names everything that is wrong with them, at once."""

import json
import re

import families
import ml_dtypes
import numpy as np
import pytest
from helpers import tiny

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop import source
from jaxmoe.interop.rules import tensor_count
from jaxmoe.parallel.sharding import make_mesh


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def tensors(folder):
    return tiny.write_checkpoint(folder, "mixtral", shards=1)


def refusal(folder, **arguments):
    with pytest.raises(UserError) as caught:
        jaxmoe.from_pretrained(folder, **arguments)
    message = str(caught.value)
    assert message.startswith(f"{folder}") or "mesh" in message
    return message


class TestTensors:
    def test_missing_and_surplus_are_listed_once_together(self, folder, tensors):
        missing = [
            "lm_head.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.3.block_sparse_moe.experts.11.w2.weight",
        ]
        surplus = [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.5.input_layernorm.weight",
            "vision.patch",
        ]
        for name in missing:
            del tensors[name]
        tiny.write_tensors(folder, tensors | dict.fromkeys(surplus, np.zeros(3, np.float32)))
        told = refusal(folder).removeprefix(f"{folder}: 6 problems: ")
        expected = [f"tensor {name} is missing" for name in missing]
        expected += [f"tensor {name} is not part of the model" for name in surplus]
        assert sorted(told.split("; ")) == sorted(expected)

    def test_one_alone_takes_one_line(self, folder, tensors):
        del tensors["model.norm.weight"]
        tiny.write_tensors(folder, tensors)
        assert refusal(folder) == f"{folder}: tensor model.norm.weight is missing"

    def test_many_are_told_in_one_line(self, folder, tensors):
        tiny.write_tensors(
            folder, {name: tensors[name] for name in tensors if "block_sparse_moe" not in name}
        )
        experts = "tensor model.layers.{0..4}.block_sparse_moe.experts.{0..11}"
        told = refusal(folder).removeprefix(f"{folder}: {5 * (1 + 12 * 3)} problems: ")
        assert sorted(told.split("; ")) == [
            *(f"{experts}.w{i}.weight is missing (60 tensors)" for i in (1, 2, 3)),
            "tensor model.layers.{0..4}.block_sparse_moe.gate.weight is missing (5 tensors)",
        ]

    def test_shape(self, folder, tensors):
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors[name] = tensors[name].T.copy()  # (D, U) for (U, D): as many bytes
        other = "model.layers.4.block_sparse_moe.experts.10.w3.weight"
        tensors[other] = tensors[other][:-1]
        tiny.write_tensors(folder, tensors)
        message = refusal(folder)
        assert f"tensor {name} has shape [40, 32], expected [32, 40]" in message
        assert f"tensor {other} has shape [27, 40], expected [28, 40]" in message
        assert "2 problems" in message

    def test_fused_experts_of_another_order(self, folder):
        """Some families store [E, D, 2F]: read as it stands it would be garbage of the right size."""
        tensors = tiny.write_checkpoint(folder, "olmoe", layout="fused", shards=1)
        for name in tensors:
            if name.endswith("experts.gate_up_proj"):
                tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
        tiny.write_tensors(folder, tensors)
        message = refusal(folder)
        assert (
            "model.layers.{0..4}.mlp.experts.gate_up_proj has shape [12, 40, 56], expected [12, 56, 40]"
            in message
        )

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [(np.int64, "I64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.uint8, "U8"), (np.bool_, "BOOL")],
    )
    def test_dtype(self, folder, tensors, dtype, name):
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((64, 40), dtype)
        tiny.write_tensors(folder, tensors)
        message = refusal(folder)
        assert message.endswith(
            f"tensor model.layers.2.self_attn.q_proj.weight has dtype {name}, expected one of BF16, F16, F32, F64"
        )

    @pytest.mark.usefixtures("tensors")
    def test_config_of_another_model(self, folder):
        config = families.config_json("mixtral", hidden_size=44, num_hidden_layers=4)
        (folder / "config.json").write_text(json.dumps(config))
        message = refusal(folder)
        assert (
            "tensor model.layers.4.block_sparse_moe.experts.{0..11}.w1.weight is not part of the model"
            in message
        )

    @pytest.mark.usefixtures("tensors")
    def test_config_of_more_tensors_than_any_model_has(self, folder):
        """Refused before an object is made of each."""
        config = families.config_json("mixtral", num_hidden_layers=900, num_local_experts=200)
        (folder / "config.json").write_text(json.dumps(config))
        told = "describes a model of 546,303 tensors, expected at most 500,000: mend the number of its layers"
        assert refusal(folder) == f"{folder / 'config.json'}: {told} or experts"
        with pytest.raises(UserError, match=f"model.config: {told}"):
            source.config_source(config)

    @pytest.mark.parametrize("layout", ["experts", "fused"])
    def test_of_the_layouts_the_one_with_the_most_tensors_counts(self, folder, layout):
        opened = tiny.write_checkpoint(folder, "olmoe", layout=layout)
        made = source.open_source(folder)
        assert len(made.bindings.of_tensor) == len(opened)
        finest = source.config_source(families.config_json("olmoe"))
        rules = made.family.rules(made.spec)
        assert tensor_count(rules, made.spec) == len(finest.bindings.of_tensor) >= len(opened)

    @pytest.mark.usefixtures("tensors")
    def test_tensors_of_another_family(self, folder):
        (folder / "config.json").write_text(json.dumps(families.config_json("olmoe")))
        message = refusal(folder)
        assert "tensor model.layers.{0..4}.self_attn.q_norm.weight is missing (5 tensors)" in message


class TestFiles:
    def test_folder_missing(self, folder):
        with pytest.raises(UserError, match=f"model folder {re.escape(str(folder))} does not exist"):
            jaxmoe.from_pretrained(folder)

    def test_hub_id_that_cannot_be_downloaded(self):
        with pytest.raises(
            UserError, match="'jaxmoe-tests/nothing' is no folder here, and could not be downloaded"
        ):
            jaxmoe.from_pretrained("jaxmoe-tests/nothing")

    @pytest.mark.usefixtures("tensors")
    def test_folder_is_a_file(self, folder):
        file = folder / "config.json"
        assert refusal(file) == f"{file}: is a file, expected a folder with config.json; give {folder}"

    @pytest.mark.usefixtures("tensors")
    def test_config_missing(self, folder):
        (folder / "config.json").unlink()
        assert refusal(folder).startswith(f"{folder / 'config.json'} does not exist")

    @pytest.mark.usefixtures("tensors")
    def test_weights_missing(self, folder):
        (folder / "model.safetensors").unlink()
        assert "no safetensors files" in refusal(folder)
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        assert "found pytorch_model.bin: convert to safetensors first" in refusal(folder)

    def test_shard_missing(self, folder):
        tiny.write_checkpoint(folder, "mixtral", shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        message = refusal(folder)
        assert "1 of the 3 shards" in message
        assert "model-00002-of-00003.safetensors" in message

    @pytest.mark.parametrize("lost", [1, 1000])
    def test_shard_truncated(self, folder, lost):
        tiny.write_checkpoint(folder, "mixtral", shards=3)
        path = folder / "model-00003-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-lost])
        message = refusal(folder)
        assert "model-00003-of-00003.safetensors: truncated" in message
        assert "download or copy it again" in message

    def test_shard_of_another_checkpoint(self, folder, tmp_path):
        tiny.write_checkpoint(folder, "mixtral", shards=3)
        tiny.write_checkpoint(tmp_path / "other", "olmoe", shards=3)
        name = "model-00001-of-00003.safetensors"
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
        assert name in refusal(folder)

    @pytest.mark.usefixtures("tensors")
    def test_source_that_vanishes_before_export(self, folder, tmp_path):
        """Its bits are read again on export; open files survive, the rest is reported."""
        model = jaxmoe.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=r"model\.safetensors: ends before byte .*; it shrank while open"):
            jaxmoe.save_pretrained(model, tmp_path / "export")
        assert not (tmp_path / "export").exists()


class TestMesh:
    def test_that_does_not_divide(self, folder):
        tiny.write_checkpoint(folder, "mixtral", shards=1, num_local_experts=7)
        message = refusal(folder, mesh=make_mesh(data=4, expert=2))
        assert message.count("E=7 is not divisible by expert=2") == 3
        assert "groups.0.0.experts.down: E=7" in message
        assert "\n" not in message

    def test_that_does_not_divide_many(self, folder):
        tiny.write_checkpoint(folder, "qwen3_moe", shards=1, hidden_size=42, vocab_size=101)
        message = refusal(folder, mesh=make_mesh(fsdp=4, tensor=2))
        assert "embed: D=42 is not divisible by fsdp=4" in message
        assert "embed: V=101 is not divisible by tensor=2" in message
        assert message.endswith("more")

    def test_is_refused_before_anything_is_read(self, folder, monkeypatch):
        tiny.write_checkpoint(folder, "mixtral", shards=1, num_local_experts=7)
        sources = []
        real = source.open_files
        monkeypatch.setattr(source, "open_files", lambda *given: sources.append(real(*given)) or sources[-1])
        refusal(folder, mesh=make_mesh(data=4, expert=2))
        assert [opened.bytes_read for opened in sources] == [0]
