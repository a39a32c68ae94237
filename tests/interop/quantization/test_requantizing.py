"""What changed is quantised anew, as the source is: whole blocks of it, to the nearest values."""

import numpy as np
import pytest
from helpers import quantize
from helpers.quantize import FP4, FP8
from helpers.quantized import BFLOAT16, BLOCK, E8M0, EXPERTS, change, made, tensors_of

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop import saving
from jaxmoe.interop.quantization import arithmetic
from jaxmoe.interop.storage.reader import CheckpointFolder


@pytest.mark.parametrize(
    ("layout", "scales", "piece"),
    [
        ("experts", np.float32, 2000),
        ("fused", np.float32, 10),
        ("experts", BFLOAT16, 10),
        ("fused", E8M0, 1 << 20),
    ],
)
def test_fp8_anew(folders, monkeypatch, layout, scales, piece):
    monkeypatch.setattr(saving, "PIECE_BYTES", piece)
    config, stored, plain = made("fp8", layout, scales)
    name, place = (
        (f"{EXPERTS}.3.up_proj.weight", (5,)) if layout == "experts" else (f"{EXPERTS}.gate_up_proj", (3, 33))
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


def test_scales_of_powers_of_two_stay_such(folders):
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
def test_mxfp4_anew(folders, monkeypatch, piece):
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


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite(folders, method, value):
    config, stored, _ = made(method)
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source)
    change(model, value, index=(-1, 3, 1, 5, 7))
    with pytest.raises(UserError, match=rf"tensor {EXPERTS}.*: a value that is not finite"):
        jaxmoe.save_pretrained(model, folders.export, quantization="source")
    assert not folders.export.exists()


def encoded(format, values, block, scales):
    index = [np.arange(size) // step for size, step in zip(values.shape, block, strict=True)]
    blocks = arithmetic.Blocks(*index, tuple(int(one[-1]) + 1 for one in index))
    return format.encode(values, blocks, scales)


def test_rounding_of_mxfp4():
    """Against the nearest values in float64."""

    random = np.random.default_rng(0)
    values = random.standard_normal((40, 96)) * 2.0 ** random.integers(-130, 120, (40, 1))
    values = values.astype(np.float32)
    values[0, :32] = 0
    values[0, :2] = -0.0, 0.0
    values[1, :33] = 1e-45
    values[2, :20] = 2.0**-3 * np.array(
        [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6, 0, 1, 2, 3]
    )
    values[2, 20:32] = 0
    values[3] = np.float32(3.4e38)
    codes, scales, _ = encoded(arithmetic.MXFP4(), values, (1, 32), np.dtype(np.uint8))
    expected_blocks, expected_scales = quantize.quantize_mxfp4(values.T[None])
    np.testing.assert_array_equal(scales, expected_scales[0])
    expected = np.stack([expected_blocks[0] % 16, expected_blocks[0] // 16], -1)
    np.testing.assert_array_equal(codes, expected.reshape(values.shape))
    assert np.abs(FP4[codes[4:]]).reshape(36, 3, 32).max(-1).min() >= 3  # the range is used


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, E8M0])
def test_rounding_of_fp8(dtype):
    """Against the nearest values in float64."""

    random = np.random.default_rng(0)
    values = random.standard_normal((30, 56)) * 2.0 ** random.integers(-100, 100, (30, 1))
    values = values.astype(np.float32)
    values[:8, :16] = 0
    values[8:16, 16:32] = 1e-44
    codes, scales, _ = encoded(arithmetic.FP8(), values, BLOCK, np.dtype(dtype))
    factors = quantize.spread(scales, BLOCK, values.shape)
    largest = quantize.spread(np.abs(quantize.blocks_of(values, BLOCK)).max((-2, -1)), BLOCK, values.shape)
    assert (factors[largest > 1e-30] * 448 * (1 + 2.0**-8) >= largest[largest > 1e-30]).all()
    assert (factors[largest > 1e-30] * 224 <= largest[largest > 1e-30]).all()
    assert (factors >= 2.0**-126).all()
    wanted = np.clip(values / factors, -448, 448)
    best = np.abs(FP8[quantize.nearest(wanted, FP8)] - wanted)
    assert (np.abs(FP8[codes.view(np.uint8)] - wanted) <= best * (1 + 1e-5)).all()
