"""Exported as the source is: what did not change repeats every byte."""

import json

import families
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import quantize, tiny
from helpers.quantize import BF16
from helpers.quantized import (
    BFLOAT16,
    BLOCK,
    E8M0,
    EXPERTS,
    QWEN,
    bytes_of,
    change,
    described,
    is_matrix,
    made,
    tensors_of,
)

import jaxmoe
from jaxmoe import cli
from jaxmoe.interop import saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.source import config_source, open_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named
from jaxmoe.run import model as run_model


@pytest.mark.parametrize(
    ("method", "layout", "dtype", "scales", "mesh"),
    [
        ("fp8", "experts", "float32", np.float32, False),
        ("fp8", "experts", "bfloat16", BFLOAT16, True),
        ("fp8", "fused", "bfloat16", E8M0, False),
        ("fp8", "fused", "float32", np.float32, True),
        ("mxfp4", "fused", "float32", None, False),
        ("mxfp4", "fused", "float16", None, True),
    ],
)
def test_untouched_repeats_every_byte(folders, monkeypatch, method, layout, dtype, scales, mesh):
    monkeypatch.setattr(saving, "PIECE_BYTES", 2000)
    config, stored, _ = made(method, layout, scales or np.float32)
    quantize.write(folders.source, config, stored)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2) if mesh else None
    model = jaxmoe.from_pretrained(folders.source, dtype=dtype, mesh=mesh)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.source) == bytes_of(folders.export)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_odd_codes_repeat_as_well(folders, dtype):
    """Scales that quantising anew would not choose, zeros of both signs, NaN, what float16 rounds."""
    config, stored, _ = made("fp8")
    name = f"{EXPERTS}.2.down_proj.weight"
    stored[name] = stored[name].copy()
    stored[name].view(np.uint8)[:2, :4] = [[0x80, 0x00, 0x01, 0x81], [0x7F, 0xFF, 0x7E, 0x38]]
    stored[name + "_scale_inv"] *= np.float32(1.37)
    stored[name + "_scale_inv"][1] = 1.1e-8
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype=dtype)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.source) == bytes_of(folders.export)


def test_changes_too_small_for_bfloat16_change_nothing(folders):
    config, stored, _ = made("mxfp4")
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    change(model, 1 + 2**-12, index=...)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.source) == bytes_of(folders.export)


def test_of_a_folder_that_is_not_quantised(folders):
    tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", num_hidden_layers=1)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.export, quantization="source")
    assert bytes_of(folders.source) == bytes_of(folders.export)


def test_of_the_commands(folders, tmp_path):
    """A step that changes nothing: both commands write either form, as the run or the command says."""
    config = QWEN | {"num_hidden_layers": 1}  # a dense one, which compiles fast
    tensors = tiny.random_tensors(config, "bfloat16")
    stored, plain, quantization = quantize.quantize(tensors, "fp8", is_matrix, BLOCK)
    quantize.write(folders.source, config | {"quantization_config": quantization}, stored)
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7 w8 w9 " * 99)
    run = {
        "model": {"path": str(folders.source), "dtype": "float32", "remat": False},
        "data": {"path": str(tmp_path / "text.txt"), "sequence_length": 8},
        "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0},
        "mesh": {"data": 8},
        "train": {"steps": 1, "batch_size": 8, "peak_tflops": 1.0, "export_quantization": "source"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert bytes_of(tmp_path / "run" / "export") == bytes_of(folders.source)
    for options, form in (([], "source"), (["--quantization", "none"], "none")):
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / f"as {form}"), *options]) == 0
    assert bytes_of(tmp_path / "as source") == bytes_of(folders.source)
    assert tensors_of(tmp_path / "as none") == described(plain)


def test_of_a_run(folders):
    """The room that a run asks for is that of the form that it writes."""
    config, stored, _ = made("mxfp4")
    quantize.write(folders.source, config, stored)
    source = open_source(folders.source)
    weights = load_params(source, jnp.float32)
    run_model.export_model(
        source, weights, folders.export, dtype=jnp.bfloat16, tokenizer_files={}, quantization="source"
    )
    assert bytes_of(folders.source) == bytes_of(folders.export)
    sizes = [sum(p.stat().st_size for p in folders.source.glob("*.safetensors")), 0]
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.plain)
    sizes[1] = sum(p.stat().st_size for p in folders.plain.glob("*.safetensors"))
    assert [run_model._stored_bytes(source, jnp.bfloat16, form) for form in ("source", "none")] == sizes


def test_minimax_m2_as_published(folders):
    """Experts called w1, w2, w3, and beside FP8 a correction bias in float32."""
    config = families.config_json("minimax_m2")
    random = np.random.default_rng(0)
    tensors = {
        name: (0.2 * random.standard_normal(binding.shape)).astype(
            np.float32 if name.endswith("e_score_correction_bias") else BF16
        )
        for name, binding in config_source(config).bindings.of_tensor.items()
    }
    is_quantised = lambda name: is_matrix(name) and "block_sparse_moe.gate." not in name
    stored, plain, quantization = quantize.quantize(tensors, "fp8", is_quantised, BLOCK, np.float32)
    assert sum(name.endswith("_scale_inv") for name in stored) == 3 * (
        4 + 6 * 3
    )  # layers, attention, experts
    quantize.write(folders.source, config | {"quantization_config": quantization}, stored)
    tiny.write_tensors(folders.plain, plain)
    (folders.plain / "config.json").write_text(json.dumps(config))
    model, expected = (jaxmoe.from_pretrained(f, dtype="bfloat16") for f in (folders.source, folders.plain))
    for (name, ours), (_, theirs) in zip(
        named(model.pure_params()), named(expected.pure_params()), strict=True
    ):
        assert ours.dtype == (np.float32 if "correction" in name else BF16)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert bytes_of(folders.source) == bytes_of(folders.export)
