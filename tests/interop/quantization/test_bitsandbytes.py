"""What is bitsandbytes' own: blocks through rows, double quantisation, states in JSON, and the library itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import packed, quantize, tiny
from helpers.packed import bnb4, bnb_config
from helpers.quantize import BF16
from helpers.quantized import (
    EXPERTS,
    PACKED,
    bytes_of,
    change,
    folder_of,
    fused_bnb,
    is_experts,
    is_matrix,
    tensors_of,
)

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop import loading, saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.quantization.config import split_config
from jaxmoe.interop.quantization.folder import QuantizedFolder
from jaxmoe.interop.source import config_source, open_source
from jaxmoe.interop.storage import problems
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.parallel.sharding import make_mesh

NAME = "a.weight"


def opened(folder, parts):
    tiny.write_tensors(folder, {f"a.{name}": array for name, array in parts.items()})
    found = []
    format = split_config({"quantization_config": {"load_in_4bit": True}}, "")[1]
    return QuantizedFolder(CheckpointFolder(folder), format, found), found


def assert_reads(files, expected):
    """The whole, boxes of it, finer axes, and in bytes."""
    shape = expected.shape
    assert {name: info.shape for name, info in files.tensors.items()} == {NAME: shape}
    *lead, rows, columns = shape
    for sizes in (shape, (*lead, rows // 2, 2, columns // 4, 4)):
        seen = expected.reshape(sizes)
        for low, high in ((0, 0), (0, 1), (1, 0), (1, 1)):
            box = tuple(slice(low, size - high) if size > 2 else slice(0, size) for size in sizes)
            found = files.read_box(NAME, sizes, box)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, seen[box])
    assert b"".join(files.iter_bytes(NAME, 70)) == expected.tobytes()


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((22, 28), 64),
        ((6, 4096), 4096),
        ((10, 36), 32),
        ((3, 14, 20), 64),
        ((5, 26, 64), 32),
        ((602, 64), 64),
    ],
)
def test_blocks_wherever_they_end(tmp_path, shape, block, nested, dtype):
    """In and across rows and experts, with a last one that is shorter, and more than 256 scales."""
    parts, expected = bnb4(np.random.default_rng(0), shape, block=block, nested=nested, dtype=dtype)
    files, found = opened(tmp_path, parts)
    assert not found
    assert_reads(files, expected)


@pytest.mark.once
@pytest.mark.parametrize("nested", [False, True])
def test_some_rows_are_read_alone(tmp_path, nested):
    parts, _ = bnb4(np.random.default_rng(0), (2**13, 96), nested=nested)
    files, _ = opened(tmp_path, parts)
    before = files.bytes_read
    files.read_box(NAME, (2**13, 96), (slice(2**11, 2**12), slice(0, 96)))
    total = sum(array.nbytes for array in parts.values())
    assert total / 4 - 1500 <= files.bytes_read - before <= total / 4 + 1500  # tables are read whole


@pytest.mark.parametrize("nested", [False, True])
def test_experts_in_one_tensor(folders, monkeypatch, nested):
    config, stored, plain = fused_bnb(nested)
    assert any(is_experts(name) and plain[name].ndim == 3 for name in plain)
    quantize.write(folders.source, config, stored)
    quantize.write(folders.plain, PACKED, plain)
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 3000)
    monkeypatch.setattr(saving, "PIECE_BYTES", 3000)
    source = open_source(folders.source)
    params = load_params(source, jnp.float32, make_mesh(fsdp=2, expert=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, params, load_params(open_source(folders.plain), jnp.float32))
    saving.export_like_source(params, source, folders.export, quantization="source")
    assert bytes_of(folders.export) == bytes_of(folders.source)


def test_the_dtype_that_was_quantised(folders):
    """Is that of the values, and of an export without quantisation."""
    config, stored, plain = fused_bnb(True, "float16")
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    jaxmoe.save_pretrained(model, folders.export)
    assert json.loads((folders.export / "config.json").read_text()) == PACKED | {"torch_dtype": "float16"}
    written = tensors_of(folders.export)
    for name, values in plain.items():
        assert written[name] == ("F16" if is_matrix(name) else "BF16", values.shape, values.tobytes())
    jaxmoe.save_pretrained(model, folders.plain, quantization="source")
    assert bytes_of(folders.plain) == bytes_of(folders.source)


@pytest.mark.parametrize("kind", ["nf4", "nf4 with double quantisation"])
def test_what_changed_cannot_be_written_in_part(folders, kind):
    config, stored, _ = folder_of(kind)
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    change(model, 1.5)
    with pytest.raises(
        UserError, match=rf"tensor {EXPERTS}.3.up_proj.weight: its values changed, .*without quantiz"
    ):
        jaxmoe.save_pretrained(model, folders.export, quantization="source")


def test_what_changed_is_quantised_as_bitsandbytes_does(folders):
    """By the codecs, which are compared with it elsewhere."""
    from jaxmoe.codecs import four_bit, int8_rows

    for kind, where in (("nf4 in rows of blocks", folders.source), ("llm.int8", folders.plain)):
        config, stored, _ = folder_of(kind)
        quantize.write(where, config, stored)
        model = jaxmoe.from_pretrained(where, dtype="float32")
        wanted = change(model, -1.75, index=(-1, 3, 1))[-1, 3, 1]  # all of an expert's matrix
        target = where.with_name(f"{where.name} again")
        jaxmoe.save_pretrained(model, target, quantization="source")
        with CheckpointFolder(target) as files:
            stem = f"{EXPERTS}.3.up_proj"
            if kind == "llm.int8":
                made = int8_rows.quantize(wanted)
                np.testing.assert_array_equal(files.read(f"{stem}.weight"), made.codes)
                np.testing.assert_array_equal(files.read(f"{stem}.SCB"), made.absmax)
            else:
                made = four_bit.to_stored(four_bit.quantize(wanted, "nf4", 32))
                np.testing.assert_array_equal(files.read(f"{stem}.weight"), made.codes)
                np.testing.assert_array_equal(files.read(f"{stem}.weight.absmax"), made.absmax)


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def with_state(parts, **fields):
    key = STATE.removeprefix("a.")
    state = {
        name: value for name, value in (json.loads(parts[key].tobytes()) | fields).items() if value is not ...
    }
    return parts | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def without(parts, name):
    return {key: value for key, value in parts.items() if key != name}


DAMAGE = {
    "another kind": (
        lambda p: (
            without(p, "weight.quant_state.bitsandbytes__nf4")
            | {"weight.quant_state.bitsandbytes__af4": np.zeros(9, np.uint8)}
        ),
        "__af4 says quant_type 'af4', expected 'nf4' or 'fp4'; convert the checkpoint to bfloat16",
    ),
    "kinds that differ": (
        lambda p: with_state(p, quant_type="fp4"),
        "says quant_type 'fp4', expected 'nf4'; downl",
    ),
    "a field": (
        lambda p: with_state(p, zz=1),
        "has fields blocksize, .*zz, expected quant_type, blocksize, dtype, ",
    ),
    "no field": (
        lambda p: with_state(p, nested_dtype=...),
        "has fields .*, expected .*nested_dtype, nested_offset",
    ),
    "a block": (lambda p: with_state(p, blocksize=48), "says blocksize 48, expected 32 or 64 or"),
    "a dtype": (lambda p: with_state(p, dtype="float64"), "says dtype 'float64', expected 'bfloat16' or"),
    "a nested dtype": (
        lambda p: with_state(p, nested_dtype="float16"),
        "nested_dtype 'float16', expected 'float32'",
    ),
    "a nested block": (
        lambda p: with_state(p, nested_blocksize=0),
        "says nested_blocksize 0, expected a positive",
    ),
    "an offset": (
        lambda p: with_state(p, nested_offset="x"),
        "says nested_offset 'x', expected a finite number",
    ),
    "axes": (
        lambda p: with_state(p, shape=[1152]),
        r"says shape \[1152\], expected two or three positive integers",
    ),
    "a shape": (
        lambda p: with_state(p, shape=[12, 48]),
        r"U8 \[576, 1\], expected 288 bytes in one of U8, .*\[12, 48\]",
    ),
    "odd rows": (
        lambda p: with_state(p, shape=[128, 9]),
        r"U8 \[576, 1\], expected 576 bytes in one of .*\[128, 9\]",
    ),
    "no JSON": (
        lambda p: p | {STATE.removeprefix("a."): np.zeros(5, np.uint8)},
        "cannot be read: not JSON .*; download it again",
    ),
    "a long state": (
        lambda p: p | {STATE.removeprefix("a."): np.zeros(5000, np.uint8)},
        "cannot be read: it is U8 of 5,000 bytes, expected U8 of at most 4,096",
    ),
    "no codes": (lambda p: without(p, "weight"), "says how a.weight is quantised, but there is no a.weight"),
    "no scales": (
        lambda p: without(p, "weight.absmax"),
        "a.weight.absmax is missing, which has the scales of a.weight",
    ),
    "scales": (
        lambda p: p | {"weight.absmax": p["weight.absmax"][:7]},
        r"a.weight.absmax has shape \[7\], expected \[18\]: the scales of a.weight",
    ),
    "wide scales": (
        lambda p: p | {"weight.absmax": p["weight.absmax"].astype(np.float32)},
        "a.weight.absmax has dtype F32, expected U8",
    ),
    "no scales of scales": (
        lambda p: without(p, "weight.nested_absmax"),
        "a.weight.nested_absmax is missing, which",
    ),
    "a table": (
        lambda p: p | {"weight.nested_quant_map": np.zeros(16, np.float32)},
        r"nested_quant_map has shape \[16\], expected \[256\]: the values of codes of a.weight",
    ),
    "no state": (
        lambda p: without(p, "weight.quant_state.bitsandbytes__nf4"),
        "a.weight.quant_map goes with no quantised weight",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_four_bits(tmp_path, what):
    parts, _ = bnb4(np.random.default_rng(0), (12, 96), nested=True)
    damage, message = DAMAGE[what]
    _, found = opened(tmp_path, damage(parts))
    with pytest.raises(UserError, match=message) as caught:
        problems.raise_problems(tmp_path, found)
    assert "\n" not in str(caught.value)


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"SCB": None}, "a.SCB is missing, which has the scales of a.weight"),
        (
            {"SCB": np.ones(11, np.float32)},
            r"a.SCB has shape \[11\], expected \[12, 1\]: the scales of a.weight",
        ),
        (
            {"weight_format": np.array(2, np.uint8)},
            "a.weight_format is 2, expected 0, for rows; save the model with",
        ),
        ({"weight_format": np.zeros(2, np.uint8)}, r"a.weight_format is U8 \[2\], expected one U8"),
        ({"weight": np.ones(30, np.int8)}, r"a.weight has shape \[30\], expected a matrix of int8"),
    ],
)
def test_damaged_int8(tmp_path, given, message):
    parts = packed.bnb8(np.random.default_rng(0), (12, 30))[0] | given
    _, found = opened(tmp_path, {name: array for name, array in parts.items() if array is not None})
    with pytest.raises(UserError, match=message):
        problems.raise_problems(tmp_path, found)


@pytest.mark.once
def test_another_code_book(tmp_path):
    parts, _ = bnb4(np.random.default_rng(0), (12, 96))
    parts["weight.quant_map"] = parts["weight.quant_map"] + np.float32(1e-7)
    files, _ = opened(tmp_path, parts)
    files.read_box(NAME, (12, 96), (slice(0, 2), slice(0, 3)))
    parts["weight.quant_map"][3] = -0.5
    files, _ = opened(tmp_path, parts)
    with pytest.raises(
        UserError, match=r"a.weight.quant_map gives code 3 the value -0.5, expected -0.394917; downl"
    ):
        files.read_box(NAME, (12, 96), (slice(0, 2), slice(0, 3)))


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"bnb_4bit_quant_type": "af4"},
            "bnb_4bit_quant_type = 'af4' is not supported; expected 'nf4' or 'fp4'",
        ),
        ({"zz": 1}, "quantization_config has unknown fields 'zz'; known are "),
        ({"load_in_4bit": 1}, "load_in_4bit = 1 is not supported; expected True or False"),
        (
            {"llm_int8_has_fp16_weight": True},
            "llm_int8_has_fp16_weight = True is not supported; expected False",
        ),
    ],
)
def test_config(given, message):
    with pytest.raises(UserError, match=message):
        config_source(PACKED | {"quantization_config": bnb_config(4) | given})


@pytest.fixture
def bnb():
    """The library, of which half a minute's download is for GPUs; nothing but these tests needs it."""
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.torch
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_library_quantises_the_same(bnb, kind, nested):
    import torch

    from jaxmoe.codecs import four_bit

    for shape, block in (
        ((5, 192), 64),
        ((7, 100), 64),
        ((3, 6, 256), 128),
        ((2, 8192), 4096),
        ((9, 96), 32),
    ):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        codes, state = bnb.functional.quantize_4bit(
            values, blocksize=block, quant_type=kind, compress_statistics=nested
        )
        ours = values.view(torch.int16).numpy().view(BF16)
        made = four_bit.to_stored(four_bit.quantize(ours, kind, block, nested))
        np.testing.assert_array_equal(made.codes, codes.numpy())
        if nested:
            np.testing.assert_allclose(made.offset, state.offset.numpy(), rtol=2e-7)
            near = (
                np.abs(made.absmax.astype(int) - state.absmax.numpy()) <= 1
            )  # it looks codes up in a short table
            assert near.all()
        else:
            np.testing.assert_array_equal(made.absmax, state.absmax.numpy())


@pytest.mark.torch
@pytest.mark.parametrize("nested", [False, True])
def test_what_the_library_stores(bnb, tmp_path, nested):
    """A linear layer, experts through replace_parameter_4bit, and int8."""
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {"a": torch.randn(10, 192), "b": torch.randn(6, 70)}
    four = bnb.nn.Linear4bit(192, 10, bias=False, quant_type="nf4", compress_statistics=nested)
    four.load_state_dict({"weight": weights["a"]})
    eight = bnb.nn.Linear8bitLt(70, 6, bias=False, has_fp16_weights=False)
    eight.load_state_dict({"weight": weights["b"]})
    model = torch.nn.ModuleDict({"a": four, "b": eight, "c": torch.nn.Module()}).to("cpu")
    model["c"].gate_up_proj = torch.nn.Parameter(torch.randn(3, 14, 128, dtype=torch.bfloat16))
    replace_parameter_4bit(model["c"], "gate_up_proj", nested, "fp4")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    format = split_config({"quantization_config": bnb_config(4)}, "")[1]
    found = []
    files = QuantizedFolder(CheckpointFolder(tmp_path), format, found)
    assert not found
    assert {name: (info.dtype, info.shape) for name, info in files.tensors.items()} == {
        "a.weight": ("F32", (10, 192)),
        "b.weight": ("BF16", (6, 70)),
        "c.gate_up_proj": ("BF16", (3, 14, 128)),
    }
    expected = {
        "a.weight": bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state),
        "b.weight": bnb.functional.int8_vectorwise_dequant(eight.weight.data, eight.weight.SCB).bfloat16(),
        "c.gate_up_proj": model["c"].gate_up_proj,
    }
    for name, values in expected.items():
        read = files.read_box(name, values.shape, [slice(0, size) for size in values.shape])
        np.testing.assert_array_equal(read.astype(np.float32), values.float().detach().numpy(), err_msg=name)
