"""Exported unquantised: the values that were loaded, and everything else of the folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quantize, tiny
from helpers.quantize import BF16
from helpers.quantized import (
    BLOCK,
    EXPERTS,
    MODELS,
    any_fp8,
    assert_equal_bits,
    bytes_of,
    change,
    described,
    made,
    tensors_of,
)

import jaxmoe
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.pretrained import from_config
from jaxmoe.interop.quantization.folder import QuantizedFolder
from jaxmoe.interop.saving import export_like_source
from jaxmoe.interop.source import open_source
from jaxmoe.interop.storage.reader import CheckpointFolder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("method", "layout"), MODELS)
def test_has_the_values_and_everything_else(folders, method, layout, shards):
    config, stored, plain = made(method, layout)
    quantize.write(folders.source, config, stored, shards)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    jaxmoe.save_pretrained(model, folders.export)
    assert tensors_of(folders.export) == described(plain)
    before, after = bytes_of(folders.source), bytes_of(folders.export)
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] == after[n]} == {"tokenizer.json", "tokenizer_config.json"}
    expected = {name: value for name, value in config.items() if name != "quantization_config"}
    dtype = "torch_dtype" if method == "fp8" else "dtype"
    assert json.loads(after["config.json"]) == expected | {dtype: "bfloat16"}
    if shards > 1:
        files = json.loads(before["model.safetensors.index.json"])["weight_map"]
        index = json.loads(after["model.safetensors.index.json"])
        assert index["weight_map"] == {name: files.get(name) or files[f"{name}_blocks"] for name in plain}
        assert index["metadata"]["total_size"] == sum(values.nbytes for values in plain.values())
    again = jaxmoe.from_pretrained(folders.export, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.pure_params(), model.pure_params())
    assert not isinstance(again.source.files, QuantizedFolder)


def test_trained_values(folders):
    config, stored, plain = made("mxfp4")
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    change(model, 1.7)  # expert 3, up, row 5
    jaxmoe.save_pretrained(model, folders.export)
    name = f"{EXPERTS}.gate_up_proj"
    plain[name] = plain[name].copy()
    plain[name][3, :, 11] = (plain[name][3, :, 11].astype(np.float32) * np.float32(1.7)).astype(BF16)
    assert tensors_of(folders.export) == described(plain)


def test_a_random_model_of_a_quantised_config_is_not_quantised(folders):
    config, _, _ = made("fp8")
    config |= {"vocab_size": 16, "num_hidden_layers": 1}
    jaxmoe.save_pretrained(from_config(config, dtype="bfloat16"), folders.export)
    assert "quantization_config" not in json.loads((folders.export / "config.json").read_text())


def test_a_file_of_scales_alone_has_no_place_without_quantisation(folders):
    config, stored, plain = made("fp8")
    scales = {name: values for name, values in stored.items() if name.endswith("_scale_inv")}
    quantize.write(folders.source, config, stored, 1)
    rest = {name: values for name, values in stored.items() if name not in scales}
    for number, part in enumerate((rest, scales)):
        tiny.write_tensors(folders.export, part)
        (folders.export / "model.safetensors").rename(folders.source / f"part{number}.safetensors")
    (folders.source / "model.safetensors").unlink()
    names = {n: f"part{number}.safetensors" for number, part in enumerate((rest, scales)) for n in part}
    (folders.source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    folders.export.rmdir()
    source = open_source(folders.source)
    left_out = export_like_source(load_params(source, jnp.float32), source, folders.export)
    assert left_out == []
    assert tensors_of(folders.export) == described(plain)
    assert {path.name for path in folders.export.glob("part*")} == {"part0.safetensors"}


@pytest.mark.parametrize("quantization", ["none", "source"])
def test_tensors_beside_the_model(folders, monkeypatch, quantization):
    """Quantised as the others are, they must not stay so in a folder whose config denies it."""
    family = dataclasses.replace(FAMILIES["qwen3_moe"], ignored=(r"^mtp\.",))
    monkeypatch.setattr("jaxmoe.interop.families.FAMILIES", FAMILIES | {"qwen3_moe": family})
    config, stored, _ = made("fp8")
    codes, scales = any_fp8((30, 56))
    quantize.write(folders.source, config, stored | {"mtp.0.weight": codes, "mtp.0.weight_scale_inv": scales})
    model = jaxmoe.from_pretrained(folders.source)
    jaxmoe.save_pretrained(model, folders.export, quantization=quantization)
    if quantization == "source":
        assert bytes_of(folders.source) == bytes_of(folders.export)
    else:
        with CheckpointFolder(folders.export) as files:
            assert_equal_bits(files.read("mtp.0.weight"), quantize.dequantize_fp8(codes, scales, BLOCK))
            assert "mtp.0.weight_scale_inv" not in files.tensors
