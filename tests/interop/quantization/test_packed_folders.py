"""Models in formats that take several tensors for one: loaded, exported unquantised and as they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quantize
from helpers.packed import FORMATS
from helpers.quantized import PACKED, bytes_of, described, folder_of, tensors_of

import jaxmoe
from jaxmoe.interop import loading, saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh

MESHED = ["int4 with zero points", "modelopt nvfp4", "gptq in any order", "awq"]


@pytest.mark.parametrize("kind", FORMATS)
def test_loads_and_exports(folders, kind):
    """Equal to the unquantised folder, which the export is; and with the source's format every byte of it again."""
    config, stored, plain = folder_of(kind)
    quantize.write(folders.source, config, stored)
    (folders.source / "quantize_config.json").write_text("{}\n")
    quantize.write(folders.plain, PACKED, plain)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    expected = load_params(open_source(folders.plain), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, model.pure_params(), expected)

    jaxmoe.save_pretrained(model, folders.export)
    assert tensors_of(folders.export) == described(plain)
    exported = json.loads((folders.export / "config.json").read_text())
    assert exported == PACKED | {"torch_dtype": "bfloat16"}
    assert not (folders.export / "quantize_config.json").exists()

    again = folders.export.with_name("again")
    jaxmoe.save_pretrained(model, again, quantization="source")
    assert bytes_of(again) == bytes_of(folders.source)


@pytest.mark.parametrize("kind", MESHED)
def test_any_mesh_and_piece(folders, monkeypatch, kind):
    config, stored, plain = folder_of(kind)
    quantize.write(folders.source, config, stored)
    quantize.write(folders.plain, PACKED, plain)
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 3000)
    monkeypatch.setattr(saving, "PIECE_BYTES", 3000)
    source = open_source(folders.source)
    params = load_params(source, jnp.float32, make_mesh(fsdp=2, expert=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, params, load_params(open_source(folders.plain), jnp.float32))
    saving.export_like_source(params, source, folders.export, quantization="source")
    assert bytes_of(folders.export) == bytes_of(folders.source)


def test_modelopt_of_a_file_of_its_own(folders):
    """Folders of before config.json said it."""
    config, stored, plain = folder_of("modelopt nvfp4")
    del config["quantization_config"]
    attention = "model.layers.1.self_attn."
    for name in ("k_proj.k_scale", "v_proj.v_scale", "q_proj.input_scale"):
        stored[attention + name] = np.array(0.25, np.float32)
    quantize.write(folders.source, config, stored)
    described_there = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        },
    }
    (folders.source / "hf_quant_config.json").write_text(json.dumps(described_there))
    model = jaxmoe.from_pretrained(folders.source)
    jaxmoe.save_pretrained(model, folders.export)
    assert tensors_of(folders.export) == described(plain)
    assert not (folders.export / "hf_quant_config.json").exists()
    jaxmoe.save_pretrained(model, folders.plain, quantization="source")
    assert bytes_of(folders.plain) == bytes_of(folders.source)


@pytest.mark.torch
def test_transformers_opens_the_export(folders):
    import torch
    from transformers import AutoModelForCausalLM

    config, stored, plain = folder_of("int4")
    quantize.write(folders.source, config, stored)
    jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.export)
    theirs = AutoModelForCausalLM.from_pretrained(folders.export, dtype=torch.bfloat16)
    tensor = theirs.model.layers[0].mlp.down_proj.weight.detach()
    expected = plain["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), expected.view(np.uint16))
