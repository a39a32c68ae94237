"""A merged folder has the values that PEFT merges, in the layout of its base."""

import json

import families
import numpy as np
import pytest
from helpers import adapters, quantize, quantized

import jaxmoe
from jaxmoe import cli
from jaxmoe.interop.peft import merging
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.merged import merge_folder
from jaxmoe.interop.peft.today import today
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.source import open_source
from jaxmoe.interop.storage.reader import CheckpointFolder

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES = {
    "qwen3_moe": {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "mixtral": {"target_modules": ["v_proj", "lm_head"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "gpt_oss": {
        "target_modules": ["k_proj", "embed_tokens"],
        "target_parameters": [*EXPERTS, "down_proj_bias", "router.weight"],
        "modules_to_save": ["lm_head"],
    },
    "granitemoe": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "phimoe": {"target_modules": ["q_proj", "lm_head"], "target_parameters": [*EXPERTS, "router.weight"]},
    "gemma4": {"target_modules": r".*language_model.*\.(q_proj|down_proj)", "target_parameters": EXPERTS},
    "ernie4_5_moe": {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "qwen3_vl_moe": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
}


def _exact(wrapped, seed=3):
    """Factors of few bits: sums of their products are exact in float32 whatever the order, and not in bfloat16."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randint(-64, 65, parameter.shape, generator=generator) / 256)


def _tensors(folder):
    """The bytes of every tensor."""
    with CheckpointFolder(folder) as opened:
        return {name: np.frombuffer(b"".join(opened.iter_bytes(name)), np.uint8) for name in opened.tensors}


def _base(name, folder, dtype, **options):
    model = families.torch_model(name).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB", **options)
    return model


@pytest.mark.torch
@pytest.mark.parametrize("original", [True, False], ids=["published", "as in memory"])
@pytest.mark.parametrize("name", CASES)
def test_merges_the_bits_of_peft(name, original, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(merging, "PIECE_ELEMENTS", merging.PIECE_ELEMENTS if original else 333)
    options = {"save_original_format": original}
    model = _base(name, tmp_path / "base", torch.bfloat16, **options)
    wrapped = adapters.adapted(model, r=4, lora_alpha=8, **CASES[name])
    _exact(wrapped)
    adapters.save(wrapped, tmp_path / "adapter")
    changed, left_out = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    with adapters.quiet():
        wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size="60KB", **options)
    before, ours, theirs = (_tensors(tmp_path / place) for place in ("base", "ours", "theirs"))
    assert ours.keys() == theirs.keys() == before.keys()
    for key, want in theirs.items():
        np.testing.assert_array_equal(ours[key], want, err_msg=key)
    differing = sum(not np.array_equal(before[key], want) for key, want in theirs.items())
    assert changed == differing + (name == "phimoe"), "its adapter repeats the bias of the head"
    assert not left_out
    files = sorted((tmp_path / "base").glob("*"))
    assert len(files) > 4
    for file in files:
        other = tmp_path / "ours" / file.name
        assert other.stat().st_size == file.stat().st_size
        if file.suffix == ".json":
            assert other.read_bytes() == file.read_bytes()
    sizes = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["metadata"]
    assert sizes["total_size"] == sum(value.size for value in ours.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_merges_dora_and_arbitrary_factors(name, tmp_path):
    import torch

    model = _base(name, tmp_path / "base", torch.float32)
    fields = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    wrapped = adapters.adapted(model, r=5, lora_alpha=7, use_dora=True, use_rslora=True, **fields)
    adapters.save(wrapped, tmp_path / "adapter")
    arguments = ["merge", *(str(tmp_path / place) for place in ("base", "adapter", "ours"))]
    assert cli.main(arguments) == 0
    with adapters.quiet():
        wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = (_tensors(tmp_path / place) for place in ("ours", "theirs"))
    for key, want in theirs.items():
        values, expected = ours[key].view(np.float32), want.view(np.float32)
        np.testing.assert_allclose(values, expected, atol=2e-6, rtol=2e-6, err_msg=key)


@pytest.mark.torch
def test_a_tied_embedding_is_refused(tmp_path):
    import torch

    model = families.torch_model("olmoe", {"tie_word_embeddings": True}).to(torch.float32)
    model.save_pretrained(tmp_path / "base")
    adapters.save(adapters.adapted(model, target_modules=["embed_tokens"]), tmp_path / "adapter")
    with pytest.raises(jaxmoe.UserError, match="ties to the output head"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    with pytest.raises(jaxmoe.UserError, match="is the folder that the model was loaded from"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "base")


@pytest.mark.once
@pytest.mark.parametrize(("method", "layout"), [("fp8", "experts"), ("fp8", "fused"), ("mxfp4", "fused")])
def test_a_quantised_base_is_merged_as_what_it_stands_for(method, layout, tmp_path):
    config, stored, meant = quantized.made(method, layout)
    quantize.write(tmp_path / "quantised", config, stored)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    quantize.write(tmp_path / "plain", plain, meant)
    anatomy, random = today(open_source(tmp_path / "plain")).anatomy, np.random.default_rng(0)
    pairs = {}
    for module, parameter in anatomy.parameters():
        if "layers.1" in module.name and module.kind != "router" and len(module.parameters[parameter]) > 1:
            (outputs, inputs), name = module.sizes(parameter), module.full(parameter)
            experts = module.parameters[parameter][:-2]
            a, b = (random.standard_normal((*experts, *shape)) for shape in ((3, inputs), (outputs, 3)))
            transposed = module.stored_transposed(parameter)
            pairs[name] = LowRank(name, a.astype(np.float32), b.astype(np.float32), 0.5, None, transposed)
    write_adapter(Adapter(pairs), anatomy, tmp_path / "adapter")
    counts = [
        merge_folder(tmp_path / base, tmp_path / "adapter", tmp_path / f"{base} merged")
        for base in ("quantised", "plain")
    ]
    assert counts[0] == counts[1]
    ours, expected = (_tensors(tmp_path / f"{base} merged") for base in ("quantised", "plain"))
    before = _tensors(tmp_path / "plain")
    assert ours.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    changed = sum(not np.array_equal(before[name], value) for name, value in expected.items())
    assert counts[0][0] == changed > 0
    assert "quantization_config" not in json.loads(
        (tmp_path / "quantised merged" / "config.json").read_text()
    )
