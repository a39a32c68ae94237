"""A merged folder has the values that PEFT merges, in the layout of its base."""

import json
import tracemalloc

import families
import numpy as np
import pytest
from helpers import adapters, quantize, quantized, tiny
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe import cli
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.peft import merging
from jaxmoe.interop.peft.adapter import Adapter, LowRank
from jaxmoe.interop.peft.merged import merge_folder
from jaxmoe.interop.peft.reading import read_adapter
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


def _whatever_can_be_adapted(anatomy):
    """Linear layers of attention and shared experts, experts and routers of the language model."""
    modules = [module for module in anatomy.modules if not module.aside]
    linear = [m.name for m in modules if m.kind == "linear" and ("attn" in m.name or "shared" in m.name)]
    bare = [
        module.full(parameter)
        for module in modules
        for parameter, shape in module.parameters.items()
        if (len(shape) == 3 and module.kind == "other") or (module.kind == "router" and len(shape) == 2)
    ]
    return {"target_modules": linear, "target_parameters": bare}


@pytest.mark.torch
@pytest.mark.parametrize("name", FAMILIES)
def test_merges_the_bits_of_peft_in_published_layouts(name, tmp_path):
    wrapped = _compare(name, tmp_path, _whatever_can_be_adapted)
    # What is read by the names that conversion rules give is written as PEFT wrote it.
    anatomy = today(open_source(tmp_path / "base")).anatomy
    write_adapter(read_adapter(tmp_path / "adapter", anatomy), anatomy, tmp_path / "again")
    theirs, ours = (_tensors(tmp_path / place) for place in ("adapter", "again"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    loaded = adapters.load(families.torch_model(name), tmp_path / "again", families.case_of(name).lost)
    assert adapters.targets_of(loaded) == wrapped


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_merges_the_bits_of_peft_in_layouts_as_in_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "PIECE_ELEMENTS", 333)
    _compare(name, tmp_path, lambda _: CASES[name], save_original_format=False)


def _compare(name, folder, config_of, **options):
    """Merge an adapter here and by PEFT, and compare the folders; returns what PEFT adapted."""
    import torch

    model = _base(name, folder / "base", torch.bfloat16, **options)
    wrapped = adapters.adapted(model, r=4, lora_alpha=8, **config_of(adapters.anatomy_of(model)))
    _exact(wrapped)
    targets = adapters.targets_of(wrapped)
    adapters.save(wrapped, folder / "adapter")
    changed, left_out = merge_folder(folder / "base", folder / "adapter", folder / "ours")
    with adapters.quiet():
        wrapped.merge_and_unload().save_pretrained(folder / "theirs", max_shard_size="60KB", **options)
    before, ours, theirs = (_tensors(folder / place) for place in ("base", "ours", "theirs"))
    assert ours.keys() == theirs.keys() == before.keys()
    for key, want in theirs.items():
        np.testing.assert_array_equal(ours[key], want, err_msg=key)
    differing = sum(not np.array_equal(before[key], want) for key, want in theirs.items())
    assert differing <= changed <= differing + 1, "an adapter of a head repeats its bias"
    assert not left_out
    files = sorted((folder / "base").glob("*"))
    assert len(files) > 3
    for file in files:
        other = folder / "ours" / file.name
        assert other.stat().st_size == file.stat().st_size
        if file.suffix == ".json":
            assert other.read_bytes() == file.read_bytes()
    sizes = json.loads((folder / "ours" / "model.safetensors.index.json").read_text())["metadata"]
    assert sizes["total_size"] == sum(value.size for value in ours.values())
    return targets


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


@pytest.mark.once
@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_transformers_4_is_merged_layer_by_layer(dora, layout, tmp_path):
    """By the formulas of a linear layer, on the tensors of the published layout."""
    before = tiny.write_checkpoint(tmp_path / "base", "mixtral", layout="experts", shards=4)
    if layout == "fused":
        tiny.write_checkpoint(tmp_path / "base", "mixtral", layout="fused", shards=4)
    random, factors, merged = np.random.default_rng(0), {}, dict(before)
    for name, weight in before.items():
        if ".experts." not in name and not name.endswith(("block_sparse_moe.gate.weight", "q_proj.weight")):
            continue
        key = "base_model.model." + name.removesuffix("weight")
        a, b = (
            random.standard_normal(s).astype(np.float32) for s in ((3, weight.shape[1]), (weight.shape[0], 3))
        )
        factors |= {key + "lora_A.weight": a, key + "lora_B.weight": b}
        merged[name] = weight + 2.5 * b @ a
        if dora:
            length = random.uniform(1, 2, weight.shape[0]).astype(np.float32)
            factors[key + "lora_magnitude_vector"] = length
            merged[name] *= (length / np.linalg.norm(merged[name], axis=1))[:, None]
    targets = ["w1", "w2", "w3", "gate", "q_proj"]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7.5, "target_modules": targets, "use_dora": dora}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    with CheckpointFolder(tmp_path / "ours") as opened:
        ours = {name: opened.read(name) for name in opened.tensors}
    if layout == "fused":
        stem = "model.layers.{}.mlp.experts."
        for layer in range(5):
            fused = {key: ours.pop(stem.format(layer) + key) for key in ("gate_up_proj", "down_proj")}
            gate_up = np.split(fused["gate_up_proj"], 2, axis=1)
            ours[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = ours.pop(
                f"model.layers.{layer}.mlp.gate.weight"
            )
            for word, values in zip(("w1", "w3", "w2"), (*gate_up, fused["down_proj"]), strict=True):
                for e, value in enumerate(values):
                    ours[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{word}.weight"] = value
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-6, rtol=2e-6, err_msg=name)


@pytest.mark.once
@pytest.mark.parametrize("layout", ["experts", "fused"])
def test_memory_is_that_of_some_pieces(layout, tmp_path):
    """Of a file of 52 MB, of which a fused tensor has 17, about 17 are held, the adapter among them."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 2}
    dense = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    tiny.write_checkpoint(
        tmp_path / "base", "qwen3_moe", dtype="bfloat16", layout=layout, shards=1, **sizes, **dense
    )
    anatomy = today(open_source(tmp_path / "base")).anatomy
    pairs = {}
    for module, parameter in anatomy.parameters():
        if "experts" in module.name:
            name, (outputs, inputs) = module.full(parameter), module.sizes(parameter)
            pairs[name] = LowRank(name, np.ones((32, 2, inputs)), np.ones((32, outputs, 2)), 0.5)
    write_adapter(Adapter(pairs), anatomy, tmp_path / "adapter")
    tracemalloc.start()
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size
    with pytest.raises(jaxmoe.UserError, match="which replacing it would delete"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter", overwrite=True)
