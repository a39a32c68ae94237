"""Quantised folders: loaded as the bfloat16 values that they stand for, exported as those or as they were."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers import quantize, tiny
from helpers.quantize import BF16, FP4, FP8

import jaxmoe
from jaxmoe import UserError, cli
from jaxmoe.config import RunConfig
from jaxmoe.interop import loading, saving
from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.loading import LocalShards, load_params, open_source
from jaxmoe.interop.pretrained import from_config, read_blueprint
from jaxmoe.interop.quantization.folder import QuantizedFolder, split_config
from jaxmoe.interop.saving import export_like_source
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.slices import finer_axes, runs
from jaxmoe.model.spec import model_params
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named
from jaxmoe.run.model import RunModel

BLOCK = (8, 16)
E8M0 = ml_dtypes.float8_e8m0fnu
BFLOAT16 = ml_dtypes.bfloat16
QWEN = tiny.config_json("qwen3_moe", num_hidden_layers=2) | {"torch_dtype": "float32"}
GPT_OSS = {
    **families.config_json("gpt_oss"),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}
EXPERTS = "model.layers.1.mlp.experts"


def is_matrix(name):
    """What FP8 checkpoints quantise: neither embeddings nor routers, norms and biases."""
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router", "bias", "sinks")
    return not any(part in name for part in kept)


def is_experts(name):
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


@functools.cache
def qwen_tensors(layout):
    return tiny.random_tensors(QWEN, "bfloat16", layout)


@functools.cache
def gpt_oss_tensors():
    random = np.random.default_rng(0)
    blueprint = read_blueprint(GPT_OSS)
    return {
        name: (0.2 * random.standard_normal(binding.shape)).astype(BF16)
        for name, binding in blueprint.bindings.of_tensor.items()
    }


def made(method, layout="experts", scales=np.float32):
    """config.json, the stored tensors, and those that they stand for."""
    config, tensors, chosen = (
        (QWEN, qwen_tensors(layout), is_matrix)
        if method == "fp8"
        else (GPT_OSS, gpt_oss_tensors(), is_experts)
    )
    stored, plain, quantization = quantize.quantize(tensors, method, chosen, BLOCK, scales)
    return config | {"quantization_config": quantization}, stored, plain


MODELS = [("fp8", "experts"), ("fp8", "fused"), ("mxfp4", "fused")]


@pytest.fixture
def folders(tmp_path):
    return SimpleNamespace(source=tmp_path / "source", export=tmp_path / "export", plain=tmp_path / "plain")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def tensors_of(folder):
    with CheckpointFolder(folder) as files:
        return {name: (i.dtype, i.shape, bytes(files.read_bytes(name))) for name, i in files.tensors.items()}


def described(tensors):
    names = {np.dtype(dtype): name for name, dtype in (("BF16", BF16), ("F32", np.float32), ("U8", np.uint8))}
    return {n: (names.get(t.dtype, "F8_E4M3"), t.shape, t.tobytes()) for n, t in tensors.items()}


def assert_equal_bits(actual, expected):
    """NaN may have any sign and payload."""
    assert actual.dtype == expected.dtype == BF16
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    actual, expected = (np.ascontiguousarray(array).view(np.uint16) for array in (actual, expected))
    np.testing.assert_array_equal(np.where(nan, 0, actual), np.where(nan, 0, expected))


def view_of(folder, method, tensors, block=BLOCK):
    """A quantised folder that needs no model."""
    tiny.write_tensors(folder, tensors)
    config = {"quant_method": method} | ({"weight_block_size": list(block)} if method == "fp8" else {})
    problems = []
    files = QuantizedFolder(
        CheckpointFolder(folder), split_config({"quantization_config": config}, "")[1], problems
    )
    assert not problems
    return files


def any_fp8(shape, block=BLOCK, dtype=np.float32, seed=0):
    """Every code, and scales from the smallest to the largest."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, shape, np.uint8).view(quantize.E4M3)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return codes, (random.uniform(0.5, 1, grid) * 2.0 ** random.integers(-120, 121, grid)).astype(dtype)


def any_mxfp4(experts, rows, columns, seed=0):
    random = np.random.default_rng(seed)
    scales = random.integers(0, 256, (experts, rows, columns // 32), np.uint8)
    scales.flat[:4] = 0, 1, 254, 255
    return random.integers(0, 256, (*scales.shape, 16), np.uint8), scales


def test_runs_of_fused_axes():
    for sizes in ((6,), (2, 5), (3, 2, 4)):
        array = np.arange(np.prod(sizes)).reshape(sizes)
        for start in range(array.size):
            for stop in range(start + 1, array.size + 1):
                found = np.concatenate([array[box].ravel() for box in runs(sizes, start, stop)])
                np.testing.assert_array_equal(found, np.arange(start, stop))


def test_finer_axes():
    assert finer_axes((6, 40), (2, 3, 8, 5)) == [[0, 1], [2, 3]]
    assert finer_axes((1, 40), (1, 8, 1, 5, 1)) == [[], [0, 1, 2, 3, 4]]
    for sizes in ((6, 20), (6, 40, 2), (3, 2, 20, 4), (240,)):
        with pytest.raises(ValueError, match="does not split"):
            finer_axes((6, 40), sizes)


class TestView:
    """Tensors of a quantised folder, read in parts."""

    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, E8M0])
    @pytest.mark.parametrize("shape", [(30, 56), (3, 30, 56), (7, 16), (8, 5)])
    def test_fp8(self, tmp_path, shape, dtype):
        codes, scales = any_fp8(shape, dtype=dtype)
        files = view_of(tmp_path, "fp8", {"a.weight": codes, "a.weight_scale_inv": scales})
        expected = quantize.dequantize_fp8(codes, scales, BLOCK)
        info = files.tensors["a.weight"]
        assert (info.dtype, info.shape, set(files.tensors)) == ("BF16", shape, {"a.weight"})
        assert_equal_bits(files.read_box("a.weight", shape, [slice(None)] * len(shape)), expected)
        box = tuple(slice(size // 3, size - 1) for size in shape)
        assert_equal_bits(files.read_box("a.weight", shape, box), expected[box])
        empty = files.read_box("a.weight", shape, [slice(0, 0), *box[1:]])
        assert empty.shape == (0, *expected[box].shape[1:])
        if shape == (3, 30, 56):
            box = (slice(1, 3), slice(0, 2), slice(4, 11), slice(20, 41))  # rows of two, fused
            assert_equal_bits(
                files.read_box("a.weight", (3, 2, 15, 56), box), expected.reshape(3, 2, 15, 56)[box]
            )

    def test_mxfp4(self, tmp_path):
        blocks, scales = any_mxfp4(3, 10, 96)
        files = view_of(
            tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales, "b": np.ones(3, np.float32)}
        )
        expected = quantize.dequantize_mxfp4(blocks, scales)
        assert {n: (i.dtype, i.shape) for n, i in files.tensors.items()} == {
            "a": ("BF16", (3, 96, 10)),
            "b": ("F32", (3,)),
        }
        assert_equal_bits(files.read_box("a", (3, 96, 10), [slice(None)] * 3), expected)
        np.testing.assert_array_equal(files.read_box("b", (3,), [slice(1, 3)]), np.ones(2))
        for sizes, box in (
            ((3, 96, 10), (slice(1, 3), slice(30, 65), slice(2, 9))),
            ((3, 96, 5, 2), (slice(0, 2), slice(64, 66), slice(1, 4), slice(1, 2))),
            ((3, 4, 24, 10), (slice(2, 3), slice(1, 3), slice(20, 23), slice(0, 10))),
        ):
            assert_equal_bits(files.read_box("a", sizes, box), expected.reshape(sizes)[box])
        assert files.read_box("a", (3, 96, 10), (slice(0, 1), slice(4, 4), slice(0, 2))).shape == (1, 0, 2)

    @pytest.mark.parametrize("chunk", [2, 50, 4 << 20])
    def test_bytes(self, tmp_path, chunk):
        blocks, scales = any_mxfp4(2, 3, 64)
        files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
        read = list(files.iter_bytes("a", chunk))
        assert max(map(len, read)) <= chunk
        values = np.frombuffer(b"".join(read), BF16).reshape(2, 64, 3)
        assert_equal_bits(values, quantize.dequantize_mxfp4(blocks, scales))

    def test_rows_of_mxfp4_are_read_once(self, tmp_path):
        """Its order goes through all rows for each column."""
        blocks, scales = any_mxfp4(4, 10, 96)
        files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
        for _ in files.iter_bytes("a", 200):
            pass
        assert files.bytes_read == blocks.nbytes + scales.nbytes

    def test_bands(self, tmp_path):
        """Whole blocks of rows, as many as fit."""
        codes, scales = any_fp8((2, 43, 5))
        files = view_of(tmp_path, "fp8", {"a": codes, "a_scale_inv": scales})
        for elements, height in ((1, 8), (100, 16), (1000, 43)):
            bands = list(files.bands(files.pairs["a"], elements))
            starts = [(e, row) for e in range(2) for row in range(0, 43, height)]
            assert [(e.start, rows.start) for e, rows, _ in bands] == starts
            np.testing.assert_array_equal(
                np.concatenate([codes.view(np.uint8)[band].ravel() for band in bands]),
                codes.view(np.uint8).ravel(),
            )

    def test_a_file_of_scales_alone_has_no_place_without_quantisation(self, folders):
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


@pytest.mark.torch
class TestTransformers:
    """Bit for bit what transformers makes of the same tensors."""

    def test_fp8(self, tmp_path):
        import torch
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        for dtype in (torch.float32, torch.bfloat16):
            codes, scales = any_fp8((24, 48))
            theirs = torch.from_numpy(scales).to(dtype)
            scales = theirs.float().numpy().astype(BF16 if dtype == torch.bfloat16 else np.float32)
            files = view_of(tmp_path, "fp8", {"a": codes, "a_scale_inv": scales})
            expected = Fp8Dequantize(None)._dequantize_one(
                torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), theirs, torch.bfloat16
            )
            actual = files.read_box("a", (24, 48), [slice(None)] * 2)
            assert_equal_bits(actual, expected.view(torch.uint16).numpy().view(BF16))

    def test_mxfp4(self, tmp_path):
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = any_mxfp4(3, 70, 160)
        files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
        expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
        actual = files.read_box("a", (3, 160, 70), [slice(None)] * 3)
        assert_equal_bits(actual, expected.view(torch.uint16).numpy().view(BF16))

    @pytest.mark.parametrize("quantization", ["none", "source"])
    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    def test_trained_folder_loads_there(self, folders, method, quantization):
        """Both forms of an export have the values that we read from it."""
        import torch
        from transformers import AutoModelForCausalLM

        config, stored, _ = made(method)
        if method == "fp8":  # they cannot read blocks that are cut off at an edge
            config |= {"moe_intermediate_size": 32, "hidden_size": 48, "intermediate_size": 80}
            tensors = tiny.random_tensors(
                {k: v for k, v in config.items() if k != "quantization_config"}, "bfloat16"
            )
            stored, _, _ = quantize.quantize(tensors, method, is_matrix, BLOCK)
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        change(model, 1.5)
        jaxmoe.save_pretrained(model, folders.export, quantization=quantization)
        expected = jaxmoe.from_pretrained(folders.export, dtype="bfloat16")
        theirs = AutoModelForCausalLM.from_pretrained(folders.export, dtype=torch.bfloat16)
        experts = theirs.model.layers[1].mlp.experts
        assert experts.gate_up_proj.dtype == torch.bfloat16
        mine = dict(named(expected.pure_params()))
        gate_up = np.asarray(mine[where(model, "gate_up")])[-1]  # (E, G, F, D)
        down = np.asarray(mine[where(model, "down")])[-1]  # (E, D, F)
        if method == "mxfp4":
            gate_up, down = gate_up.transpose(0, 3, 2, 1), down.transpose(0, 2, 1)
        for array, tensor in ((gate_up, experts.gate_up_proj), (down, experts.down_proj)):
            array = np.ascontiguousarray(array).reshape(tensor.shape)
            np.testing.assert_array_equal(
                array.view(np.uint16), tensor.detach().contiguous().view(torch.uint16).numpy()
            )


def where(model, part):
    """The parameter of the experts of the last layer that has any."""
    return [name for name, _ in named(model.pure_params()) if name.endswith(f"experts.{part}")][-1]


def change(model, factor, part="gate_up", index=(-1, 3, 1, 5)):
    """Multiply some numbers of the experts, as training would."""
    leaf = functools.reduce(
        lambda tree, key: tree[int(key) if key.isdigit() else key],
        where(model, part).split("."),
        model.params,
    )
    values = np.array(leaf[...])
    with np.errstate(invalid="ignore"):
        values[index] = (values[index].astype(np.float32) * factor).astype(values.dtype)
    leaf[...] = jax.device_put(values, leaf[...].sharding)
    return values


class TestLoading:
    @pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=["no mesh", "mesh"])
    @pytest.mark.parametrize(("method", "layout"), MODELS)
    def test_equals_the_unquantised_folder(self, folders, monkeypatch, method, layout, mesh):
        config, stored, plain = made(method, layout)
        quantize.write(folders.source, config, stored)
        quantize.write(folders.plain, {k: v for k, v in config.items() if k != "quantization_config"}, plain)
        expected = load_params(open_source(folders.plain), jnp.float32)
        source = open_source(folders.source)
        if mesh is not None:
            monkeypatch.setattr(loading, "PIECE_ELEMENTS", 3000)
        actual = load_params(source, jnp.float32, None if mesh is None else make_mesh(**mesh))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        if mesh is None:
            assert source.files.bytes_read == sum(values.nbytes for values in stored.values())

    @pytest.mark.parametrize(
        ("method", "layout", "mesh", "devices", "share"),
        [
            ("fp8", "experts", {"data": 2, "expert": 4}, [1, 5], 1 / 4),
            ("fp8", "fused", {"data": 2, "expert": 4}, [0, 2, 3], 3 / 4),
            ("mxfp4", "fused", {"data": 4, "expert": 2}, [1], 1 / 2),
            ("mxfp4", "fused", {"data": 4, "tensor": 2}, [0], 1 / 2),
            ("mxfp4", "fused", {"expert": 2, "tensor": 4}, [3], 1 / 8),
        ],
    )
    def test_a_process_reads_what_its_own_devices_hold(
        self, folders, monkeypatch, method, layout, mesh, devices, share
    ):
        monkeypatch.setattr(loading, "PIECE_ELEMENTS", 1 << 12)
        config, stored, _ = made(method, layout)
        quantize.write(folders.source, config, stored)
        source = open_source(folders.source)
        name = "groups.0.0.experts.gate_up" if method == "mxfp4" else "groups.0.1.experts.gate_up"
        parts = source.bindings.of_parameter
        (name,) = [name] if name in parts else [n for n in parts if n.endswith("experts.gate_up")]
        expected = np.asarray(dict(named(load_params(source, np.float32)))[name])
        declared = dict(named(model_params(source.spec)))[name]
        mesh = make_mesh(**mesh)
        indices = shardings({name: declared}, mesh)[name].devices_indices_map(declared.shape)
        local = {device: indices[device] for device in mesh.devices.flat[devices]}
        shards = LocalShards(
            declared, SimpleNamespace(addressable_devices_indices_map=lambda _: local), np.dtype("float32")
        )
        reads = []
        read_into = CheckpointFolder.read_into

        def record(self, file, offset, target):
            reads.append((file, offset, len(target)))
            return read_into(self, file, offset, target)

        monkeypatch.setattr(CheckpointFolder, "read_into", record)
        for part in parts[name]:
            shards.fill(part, source.files)
        for index in local.values():
            np.testing.assert_array_equal(shards.at(index), expected[index])
        width = 1 if method == "fp8" else 0.5
        codes = [source.files.stored.tensors[source.files.pairs[part.source].codes] for part in parts[name]]
        in_codes = [
            count for file, at, count in reads if any(i.file == file and i.start <= at < i.end for i in codes)
        ]
        assert sum(in_codes) == declared.size * width * share
        assert sum(count for _, _, count in reads) - sum(in_codes) <= 2 * sum(in_codes)  # tiny blocks' scales


class TestExportUnquantised:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize(("method", "layout"), MODELS)
    def test_has_the_values_and_everything_else(self, folders, method, layout, shards):
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

    def test_trained_values(self, folders):
        config, stored, plain = made("mxfp4")
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        change(model, 1.7)  # expert 3, up, row 5
        jaxmoe.save_pretrained(model, folders.export)
        name = f"{EXPERTS}.gate_up_proj"
        plain[name] = plain[name].copy()
        plain[name][3, :, 11] = (plain[name][3, :, 11].astype(np.float32) * np.float32(1.7)).astype(BF16)
        assert tensors_of(folders.export) == described(plain)

    def test_a_random_model_of_a_quantised_config_is_not_quantised(self, folders):
        config, _, _ = made("fp8")
        config |= {"vocab_size": 16, "num_hidden_layers": 1}
        jaxmoe.save_pretrained(from_config(config, dtype="bfloat16"), folders.export)
        assert "quantization_config" not in json.loads((folders.export / "config.json").read_text())


class TestExportAsTheSource:
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
    def test_untouched_repeats_every_byte(self, folders, monkeypatch, method, layout, dtype, scales, mesh):
        monkeypatch.setattr(saving, "PIECE_BYTES", 2000)
        config, stored, _ = made(method, layout, scales or np.float32)
        quantize.write(folders.source, config, stored)
        mesh = make_mesh(fsdp=2, expert=2, tensor=2) if mesh else None
        model = jaxmoe.from_pretrained(folders.source, dtype=dtype, mesh=mesh)
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
        assert bytes_of(folders.source) == bytes_of(folders.export)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_odd_codes_repeat_as_well(self, folders, dtype):
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

    def test_changes_too_small_for_bfloat16_change_nothing(self, folders):
        config, stored, _ = made("mxfp4")
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        change(model, 1 + 2**-12, index=...)
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
        assert bytes_of(folders.source) == bytes_of(folders.export)

    @pytest.mark.parametrize(
        ("layout", "scales", "piece"),
        [
            ("experts", np.float32, 2000),
            ("fused", np.float32, 10),
            ("experts", BFLOAT16, 10),
            ("fused", E8M0, 1 << 20),
        ],
    )
    def test_fp8_anew(self, folders, monkeypatch, layout, scales, piece):
        monkeypatch.setattr(saving, "PIECE_BYTES", piece)
        config, stored, plain = made("fp8", layout, scales)
        name, place = (
            (f"{EXPERTS}.3.up_proj.weight", (5,))
            if layout == "experts"
            else (f"{EXPERTS}.gate_up_proj", (3, 33))
        )
        stored[name] = stored[name].copy()
        stored[name].view(np.uint8)[(*place, 3)] = 0x7F  # NaN in the block to the left, which does not change
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        values = change(model, -9.0, index=(-1, 3, 1, 5, slice(20, 22)))  # expert 3, up, row 5: of 28 rows
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
        before, after = tensors_of(folders.source), tensors_of(folders.export)
        assert {n for n in before if before[n] != after[n]} == {name, name + "_scale_inv"}
        with CheckpointFolder(folders.export) as files:
            codes, factors = files.read(name), files.read(name + "_scale_inv")
        # One block of 8 × 16 changed, the one of columns 16 to 31. Its scale and rounding are the naive ones.
        wanted = plain[name].astype(np.float32)
        wanted[(*place, slice(20, 22))] = values[-1, 3, 1, 5, 20:22]
        rows = slice(place[-1] // 8 * 8, place[-1] // 8 * 8 + 8)
        block = (*place[:-1], rows, slice(16, 32))
        fresh, scale = quantize.quantize_fp8(wanted[block], BLOCK, scales)
        assert factors[(*place[:-1], place[-1] // 8, 1)] == scale[0, 0]
        np.testing.assert_array_equal(codes[block].view(np.uint8), fresh.view(np.uint8))
        expected, expected_scales = stored[name].copy(), stored[name + "_scale_inv"].copy()
        expected[block], expected_scales[(*place[:-1], place[-1] // 8, 1)] = fresh, scale[0, 0]
        assert (codes.tobytes(), factors.tobytes()) == (expected.tobytes(), expected_scales.tobytes())

    def test_scales_of_powers_of_two_stay_such(self, folders):
        """DeepSeek-V3.1: float32 that holds powers of two, as the config says."""
        config, stored, _ = made("fp8", "experts")
        config["quantization_config"] |= {"scale_fmt": "ue8m0"}
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        values = change(model, -1.7, index=...)
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
        with CheckpointFolder(folders.export) as files:
            scales = files.read(f"{EXPERTS}.3.up_proj.weight_scale_inv")
        largest = np.abs(quantize.blocks_of(values[-1, 3, 1], BLOCK)).max((-2, -1))
        np.testing.assert_array_equal(scales, 2.0 ** np.ceil(np.log2(largest / 448)))

    @pytest.mark.parametrize("piece", [1000, 1 << 20])
    def test_mxfp4_anew(self, folders, monkeypatch, piece):
        monkeypatch.setattr(saving, "PIECE_BYTES", piece)
        config, stored, plain = made("mxfp4")
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source, dtype="float32")
        values = change(model, 2.3, index=(-1, 3, 1, 5, slice(40, 43)))  # up: rows interleave with gate's
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
        name = f"{EXPERTS}.gate_up_proj"
        before, after = tensors_of(folders.source), tensors_of(folders.export)
        assert {n for n in before if before[n] != after[n]} <= {f"{name}_blocks", f"{name}_scales"}
        wanted = plain[name].astype(np.float32)
        wanted[3, 40:43, 11] = values[-1, 3, 1, 5, 40:43]
        blocks, scales = quantize.quantize_mxfp4(wanted[3:4, 32:64, 11:12])
        expected_blocks, expected_scales = stored[f"{name}_blocks"].copy(), stored[f"{name}_scales"].copy()
        expected_blocks[3, 11, 1], expected_scales[3, 11, 1] = blocks[0, 0, 0], scales[0, 0, 0]
        assert (expected_blocks != stored[f"{name}_blocks"]).any()
        assert after[f"{name}_blocks"][2] == expected_blocks.tobytes()
        assert after[f"{name}_scales"][2] == expected_scales.tobytes()

    @pytest.mark.parametrize(
        ("method", "mesh"),
        [
            ("fp8", {"fsdp": 2, "expert": 2, "tensor": 2}),
            ("fp8", {"tensor": 4, "data": 2}),
            ("mxfp4", {"tensor": 4, "fsdp": 2}),
        ],
    )
    def test_any_mesh_and_piece_writes_the_same(self, folders, monkeypatch, tmp_path, method, mesh):
        config, stored, _ = made(method, "fused")
        quantize.write(folders.source, config, stored)
        source = open_source(folders.source)
        double = functools.partial(jax.tree.map, jax.jit(lambda x: x * 1.1))
        export_like_source(
            double(load_params(source, jnp.float32)), source, folders.export, quantization="source"
        )
        monkeypatch.setattr(saving, "PIECE_BYTES", 1500)
        params = double(load_params(source, jnp.float32, make_mesh(**mesh)))
        export_like_source(params, source, tmp_path / "mesh", quantization="source")
        assert bytes_of(tmp_path / "mesh") == bytes_of(folders.export) != bytes_of(folders.source)

    @pytest.mark.parametrize("quantization", ["none", "source"])
    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    def test_other_processes_compute_the_same(self, folders, monkeypatch, method, quantization):
        """One that skipped a slice would leave the others waiting for it."""
        config, stored, _ = made(method)
        quantize.write(folders.source, config, stored)
        source, calls = open_source(folders.source), []
        params = load_params(source, jnp.float32)
        slice_bits = saving.slice_bits

        def record(array, box):
            calls[-1].append((array.shape, str(box)))
            return slice_bits(array, box)

        monkeypatch.setattr(saving, "slice_bits", record)
        for process in (0, 1):
            calls.append([])
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            export_like_source(params, source, folders.export / str(process), quantization=quantization)
        assert calls[0] == calls[1]
        assert len(calls[0]) > 20
        assert [path.name for path in folders.export.iterdir()] == ["0"]

    @pytest.mark.parametrize("quantization", ["none", "source"])
    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    def test_a_failure_leaves_no_process_waiting(self, folders, monkeypatch, method, quantization):
        """What the others compute is computed to its end before the failure is told."""
        config, stored, _ = made(method)
        quantize.write(folders.source, config, stored)
        source, calls = open_source(folders.source), []
        params = load_params(source, jnp.float32)
        slice_bits, shard = saving.slice_bits, saving.FolderWriter.shard

        def record(array, box):
            calls[-1].append((array.shape, str(box)))
            return slice_bits(array, box)

        def on_a_full_disk(self, plan, fetch):
            def until_full(info):
                for data in fetch(info):
                    if len(calls[-1]) > 15:
                        raise OSError(28, "No space left on device")
                    yield data

            shard(self, plan, until_full)

        monkeypatch.setattr(saving, "slice_bits", record)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        calls.append([])
        monkeypatch.setattr(saving.FolderWriter, "shard", on_a_full_disk)
        with pytest.raises(UserError, match="No space left"):
            export_like_source(params, source, folders.export, quantization=quantization)
        assert not folders.export.exists()
        calls.append([])
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        export_like_source(params, source, folders.export, quantization=quantization)
        assert calls[0] == calls[1]

    @pytest.mark.parametrize("quantization", ["none", "source"])
    def test_tensors_beside_the_model(self, folders, monkeypatch, quantization):
        """Quantised as the others are, they must not stay so in a folder whose config denies it."""
        family = dataclasses.replace(FAMILIES["qwen3_moe"], ignored=(r"^mtp\.",))
        monkeypatch.setattr("jaxmoe.interop.families.FAMILIES", FAMILIES | {"qwen3_moe": family})
        config, stored, _ = made("fp8")
        codes, scales = any_fp8((30, 56))
        quantize.write(
            folders.source, config, stored | {"mtp.0.weight": codes, "mtp.0.weight_scale_inv": scales}
        )
        model = jaxmoe.from_pretrained(folders.source)
        jaxmoe.save_pretrained(model, folders.export, quantization=quantization)
        if quantization == "source":
            assert bytes_of(folders.source) == bytes_of(folders.export)
        else:
            with CheckpointFolder(folders.export) as files:
                assert_equal_bits(files.read("mtp.0.weight"), quantize.dequantize_fp8(codes, scales, BLOCK))
                assert "mtp.0.weight_scale_inv" not in files.tensors

    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_a_value_that_is_not_finite(self, folders, method, value):
        config, stored, _ = made(method)
        quantize.write(folders.source, config, stored)
        model = jaxmoe.from_pretrained(folders.source)
        change(model, value, index=(-1, 3, 1, 5, 7))
        with pytest.raises(UserError, match=rf"tensor {EXPERTS}.*: a value that is not finite"):
            jaxmoe.save_pretrained(model, folders.export, quantization="source")
        assert not folders.export.exists()

    def test_of_a_folder_that_is_not_quantised(self, folders):
        tiny.write_checkpoint(folders.source, "qwen3_moe", "bfloat16", num_hidden_layers=1)
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.export, quantization="source")
        assert bytes_of(folders.source) == bytes_of(folders.export)

    def test_of_the_commands(self, folders, tmp_path):
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

    def test_of_a_run(self, folders):
        """The room that a run asks for is that of the form that it writes."""
        config, stored, _ = made("mxfp4")
        quantize.write(folders.source, config, stored)
        source = open_source(folders.source)
        model = RunModel(source, jnp.bfloat16)
        model.export(load_params(source, jnp.float32), folders.export, {}, quantization="source")
        assert bytes_of(folders.source) == bytes_of(folders.export)
        sizes = [sum(p.stat().st_size for p in folders.source.glob("*.safetensors")), 0]
        jaxmoe.save_pretrained(jaxmoe.from_pretrained(folders.source), folders.plain)
        sizes[1] = sum(p.stat().st_size for p in folders.plain.glob("*.safetensors"))
        assert [model._stored_bytes(form) for form in ("source", "none")] == sizes


def test_minimax_m2_as_published(folders):
    """Experts called w1, w2, w3, and beside FP8 a correction bias in float32."""
    config = families.config_json("minimax_m2")
    random = np.random.default_rng(0)
    tensors = {
        name: (0.2 * random.standard_normal(binding.shape)).astype(
            np.float32 if name.endswith("e_score_correction_bias") else BF16
        )
        for name, binding in read_blueprint(config).bindings.of_tensor.items()
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


class TestRounding:
    """Of what is quantised anew, against the nearest values in float64."""

    def test_mxfp4(self):
        from jaxmoe.interop.quantization.mxfp4 import MXFP4

        random = np.random.default_rng(0)
        values = random.standard_normal((40, 96)) * 2.0 ** random.integers(-130, 120, (40, 1))
        values = values.astype(np.float32)
        values[0, :32] = 0
        values[0, :2] = -0.0, 0.0
        values[1, :33] = 1e-45
        values[2, :20] = np.float32(2.0**-3) * np.array(
            [
                6,
                0.25,
                0.75,
                1.25,
                1.75,
                2.5,
                3.5,
                5,
                -0.25,
                -0.75,
                -1.25,
                -1.75,
                -2.5,
                -3.5,
                -5,
                -6,
                0,
                1,
                2,
                3,
            ]
        )
        values[2, 20:32] = 0
        values[3] = np.float32(3.4e38)
        blocks, scales = MXFP4().encode(values, np.dtype(np.uint8))
        expected_blocks, expected_scales = quantize.quantize_mxfp4(values.T[None])
        np.testing.assert_array_equal(scales, expected_scales[0])
        np.testing.assert_array_equal(blocks, expected_blocks[0])
        codes = np.stack([blocks % 16, blocks // 16], -1).reshape(values.shape)
        assert np.abs(FP4[codes[4:]]).reshape(36, 3, 32).max(-1).min() >= 3  # the range is used

    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, E8M0])
    def test_fp8(self, dtype):
        from jaxmoe.interop.quantization.block_fp8 import BlockFP8

        random = np.random.default_rng(0)
        values = random.standard_normal((30, 56)) * 2.0 ** random.integers(-100, 100, (30, 1))
        values = values.astype(np.float32)
        values[:8, :16] = 0
        values[8:16, 16:32] = 1e-44
        codes, scales = BlockFP8(BLOCK).encode(values, np.dtype(dtype))
        factors = quantize.spread(scales, BLOCK, values.shape)
        largest = quantize.spread(
            np.abs(quantize.blocks_of(values, BLOCK)).max((-2, -1)), BLOCK, values.shape
        )
        assert (factors[largest > 1e-30] * 448 * (1 + 2.0**-8) >= largest[largest > 1e-30]).all()
        assert (factors[largest > 1e-30] * 224 <= largest[largest > 1e-30]).all()
        assert (factors >= 2.0**-126).all()
        wanted = np.clip(values / factors, -448, 448)
        best = np.abs(FP8[quantize.nearest(wanted, FP8)] - wanted)
        assert (np.abs(FP8[codes.view(np.uint8)] - wanted) <= best * (1 + 1e-5)).all()


class TestErrors:
    """Everything that is wrong with a folder stands in one message."""

    def refusal(self, folder, config, tensors):
        quantize.write(folder, config, tensors, 1)
        with pytest.raises(UserError) as caught:
            open_source(folder)
        return str(caught.value).removeprefix(f"{folder}: ")

    def test_damaged_fp8(self, folders):
        config, stored, _ = made("fp8")
        stem = f"{EXPERTS}."
        del stored[stem + "0.up_proj.weight_scale_inv"]
        del stored[stem + "1.up_proj.weight"]
        stored[stem + "2.up_proj.weight_scale_inv"] = np.ones((4, 2), np.float32)
        stored[stem + "3.up_proj.weight_scale_inv"] = np.ones((4, 3), np.float16)
        stored[stem + "4.up_proj.weight"] = np.ones((28, 40), np.float32)
        stored["model.norm.weight"] = np.ones(40, quantize.E4M3)
        told = self.refusal(folders.source, config, stored).removeprefix("7 problems: ").split("; ")
        assert sorted(told) == sorted(
            [
                f"tensor {stem}0.up_proj.weight_scale_inv is missing, which has the scales of "
                f"{stem}0.up_proj.weight",
                f"tensor {stem}1.up_proj.weight_scale_inv has scales, but there is no {stem}1.up_proj.weight",
                f"tensor {stem}1.up_proj.weight is missing",
                f"tensor {stem}2.up_proj.weight_scale_inv has shape [4, 2], expected [4, 3]: the scales of "
                f"{stem}2.up_proj.weight",
                f"tensor {stem}3.up_proj.weight_scale_inv has dtype F16, expected one of F32, BF16, F8_E8M0",
                f"tensor {stem}4.up_proj.weight has dtype F32, expected F8_E4M3: "
                f"{stem}4.up_proj.weight_scale_inv has scales of it",
                "tensor model.norm.weight has shape [40], expected matrices to have scales of",
            ]
        )

    def test_damaged_mxfp4(self, folders):
        config, stored, plain = made("mxfp4")
        first, second = "model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."
        del stored[first + "gate_up_proj_scales"]
        del stored[first + "down_proj_blocks"]
        stored[second + "gate_up_proj"] = plain[second + "gate_up_proj"]
        stored[second + "down_proj_scales"] = stored[second + "down_proj_scales"][:, :, :2].astype(np.float32)
        told = self.refusal(folders.source, config, stored).removeprefix("6 problems: ").split("; ")
        assert sorted(told) == sorted(
            [
                f"tensor {first}gate_up_proj_scales is missing, which has the scales of {first}gate_up_proj_blocks",
                f"tensor {first}down_proj_scales has scales, but there is no {first}down_proj_blocks",
                f"tensor {first}down_proj is missing",
                f"tensor {second}gate_up_proj is there twice, as it is and as {second}gate_up_proj_blocks: expected "
                "one of them",
                f"tensor {second}down_proj_scales has shape [4, 64, 2], expected [4, 64, 3]: the scales of "
                f"{second}down_proj_blocks",
                f"tensor {second}down_proj_scales has dtype F32, expected U8",
            ]
        )

    @pytest.mark.parametrize(
        "blocks",
        [
            np.zeros((4, 64, 3, 15), np.uint8),
            np.zeros((4, 64, 16), np.uint8),
            np.zeros((4, 64, 3, 16), np.int8),
        ],
    )
    def test_blocks_of_another_kind(self, folders, blocks):
        config, stored, _ = made("mxfp4")
        stored[f"{EXPERTS}.down_proj_blocks"] = blocks
        told = self.refusal(folders.source, config, stored)
        assert (
            f"tensor {EXPERTS}.down_proj_blocks is {'I8' if blocks.dtype == np.int8 else 'U8'} [4, 64, "
            in told
        )
        assert "expected U8 of shape [experts, out, in / 32, 16]" in told

    def test_shape_of_the_unquantised_tensor(self, folders):
        config, stored, _ = made("fp8")
        name = f"{EXPERTS}.4.down_proj.weight"
        stored[name], stored[name + "_scale_inv"] = any_fp8((40, 30))
        assert self.refusal(folders.source, config, stored) == (
            f"tensor {name} has shape [40, 30], expected [40, 28]"
        )

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("fp8", "quantization_config = 'fp8': expected an object with a quant_method"),
            ({}, r"quantization_config.quant_method = None is not supported; supported: fp8, mxfp4"),
            ({"quant_method": ["fp8"]}, r"quant_method = \['fp8'\] is not supported; supported: fp8, mxfp4"),
            (
                {"quant_method": "awq", "bits": 4},
                "quant_method = 'awq' is not supported; supported: fp8, mxfp4. Conv",
            ),
            ({"quant_method": "mxfp4", "bits": 4}, "has unknown fields 'bits'; known are dequantize, mod"),
            (
                {"quant_method": "fp8", "weight_block_size": [8, 8], "zz": 4},
                "has unknown fields 'zz'; known are act",
            ),
            ({"quant_method": "fp8"}, "weight_block_size = None: expected two positive integers"),
            (
                {"quant_method": "fp8", "weight_block_size": [8, 0]},
                r"weight_block_size = \[8, 0\]: expected two",
            ),
            (
                {"quant_method": "fp8", "weight_block_size": [8, True]},
                r"weight_block_size = \[8, True\]: expected",
            ),
            (
                {"quant_method": "fp8", "weight_block_size": [8]},
                r"weight_block_size = \[8\]: expected two positive",
            ),
            (
                {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [8, 8]},
                "quantization_config.activation_scheme = 'static' is not supported; expected 'dynamic'",
            ),
            (
                {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [8, 8]},
                "quantization_config.fmt = 'e5m2' is not supported; expected 'e4m3' or 'float8_e4m3fn'",
            ),
        ],
    )
    def test_config(self, given, message):
        with pytest.raises(UserError, match=message):
            read_blueprint(QWEN | {"quantization_config": given})

    def test_run_of_random_weights_has_no_source(self):
        run = {
            "model": {"config": QWEN},
            "data": {"path": "text.txt", "sequence_length": 8},
            "optimizer": {"learning_rate": 0.1},
            "train": {"steps": 1, "batch_size": 1, "export_quantization": "source"},
            "output_dir": "run",
        }
        with pytest.raises(
            UserError, match="train.export_quantization: found 'source', but model.path names no"
        ):
            RunConfig.from_mapping(run, "")

    def test_config_of_nothing(self):
        assert read_blueprint(QWEN | {"quantization_config": None}).spec == read_blueprint(QWEN).spec

    def test_unknown_form_of_export(self, folders):
        tiny.write_checkpoint(folders.source, "olmoe", "bfloat16", shards=1, num_hidden_layers=1)
        model = jaxmoe.from_pretrained(folders.source)
        with pytest.raises(UserError, match="quantization 'fp8': expected 'none' or 'source'"):
            jaxmoe.save_pretrained(model, folders.export, quantization="fp8")

    def test_random_model_has_no_source(self, folders):
        model = SimpleNamespace(source=read_blueprint(QWEN))
        with pytest.raises(
            UserError, match="'source': the model has random weights and no source; expected 'none'"
        ):
            jaxmoe.save_pretrained(model, folders.export, quantization="source")
