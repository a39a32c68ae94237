"""What changed is quantised anew in formats that take several tensors for one: whole blocks of it, none cut off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quantize
from helpers.quantize import E4M3, FP4, FP8, nearest
from helpers.quantized import BFLOAT16, EXPERTS, bytes_of, change, folder_of, tensors_of, where

import jaxmoe
from jaxmoe import UserError
from jaxmoe.interop import saving
from jaxmoe.interop.loading import load_params
from jaxmoe.interop.quantization import arithmetic
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named

ENDINGS = {
    "fp8 per row": ("weight", "weight_scale"),
    "modelopt fp8": ("weight", "weight_scale"),
    "modelopt nvfp4": ("weight", "weight_scale"),
    "int4": ("weight_packed", "weight_scale"),
    "int4 with zero points": ("weight_packed", "weight_scale", "weight_zero_point"),
    "int4 in any order": ("weight_packed", "weight_scale"),
    "int8": ("weight", "weight_scale"),
    "nvfp4": ("weight_packed", "weight_scale"),
    "mxfp4": ("weight_packed", "weight_scale"),
    "awq": ("qweight", "scales", "qzeros"),
    "gptq": ("qweight", "scales", "qzeros"),
    "gptq in any order": ("qweight", "scales", "qzeros"),
    "gptq of 8 bits": ("qweight", "scales", "qzeros"),
    "nf4 in rows of blocks": ("weight", "weight.absmax"),
    "llm.int8": ("weight", "SCB"),
}
STEPS = {"fp8": 2.0**-4, "float": 2.0**-4, "nvfp4": 2.0**-2, "mxfp4": 2.0**-2, "int8": 1 / 127, "int4": 1 / 7}
STEPS["nf4 in"] = 0.304
"""Largest error over the largest number of a block; by default that of four bits, half of 1/15 of the range."""


ROW, COLUMNS = 5, slice(34, 37)
STEM = f"{EXPERTS}.3.up_proj"


def trained(folders, kind, factors):
    """The matrix of an expert before, as training leaves it, and as the export has it; and which tensors changed."""
    config, stored, plain = folder_of(kind)
    quantize.write(folders.source, config, stored)
    model = jaxmoe.from_pretrained(folders.source, dtype="float32")
    wanted = change(model, factors, index=(-1, 3, 1, ROW, COLUMNS))[-1, 3, 1]
    jaxmoe.save_pretrained(model, folders.export, quantization="source")
    before, after = tensors_of(folders.source), tensors_of(folders.export)
    again = jaxmoe.from_pretrained(folders.export, dtype="float32")
    made = np.asarray(dict(named(again.pure_params()))[where(again, "gate_up")])[-1, 3, 1]
    changed = {name for name in before if before[name] != after[name]}
    return plain[f"{STEM}.weight"].astype(np.float32), wanted, made, changed


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "piece"), [*((kind, 3000) for kind in ENDINGS), ("gptq", 8 << 20), ("int4", 8 << 20)]
)
def test_blocks_that_changed(folders, monkeypatch, kind, piece):
    monkeypatch.setattr(saving, "PIECE_BYTES", piece)
    before, wanted, made, changed = trained(
        folders, kind, np.array([-3.0, 2.5, 0.5]) / (5 if "nvfp4" in kind else 1)
    )
    assert changed <= {f"{STEM}.{ending}" for ending in ENDINGS[kind]}
    assert changed
    others = made != before  # only what shares a scale with a number that changed: in a group, a row, or all
    if kind != "modelopt fp8":
        assert not np.delete(others, ROW, 0).any()
    if kind in ("int4", "int4 with zero points", "awq", "gptq", "mxfp4", "nf4 in rows of blocks"):
        assert not others[ROW, :32].any()
        assert not others[ROW, 64:].any()
    step = next((size for name, size in STEPS.items() if name in kind), 2 / 15)
    error, size = np.abs(made - wanted), np.abs(wanted)
    if kind not in ("modelopt fp8", "fp8 per row", "int8", "llm.int8"):
        size, error = size[ROW, 32:64], error[ROW, 32:64]
        if kind.endswith("any order"):
            size = np.abs(wanted[ROW])
    assert error.max() <= size.max() * step * 0.52
    if "order" not in kind and kind != "modelopt fp8":  # the largest is not cut off
        assert np.abs(made[ROW]).max() >= np.abs(wanted[ROW]).max() * (1 - step * 0.52)


@pytest.mark.parametrize("kind", ["gptq in any order", "modelopt nvfp4", "int4 with zero points"])
def test_any_mesh_and_process_computes_the_same(folders, monkeypatch, kind):
    """Other processes than the one that writes slice the same parts, or it would wait for them for ever."""
    config, stored, _ = folder_of(kind)
    quantize.write(folders.source, config, stored)
    source = open_source(folders.source)
    trained = jax.jit(lambda params: jax.tree.map(lambda x: x * 1.1, params))
    saving.export_like_source(
        trained(load_params(source, jnp.float32)), source, folders.export, quantization="source"
    )
    monkeypatch.setattr(saving, "PIECE_BYTES", 3000)
    params = trained(load_params(source, jnp.float32, make_mesh(fsdp=2, expert=2, tensor=2)))
    slice_bits, calls = saving.slice_bits, []

    def record(array, box):
        calls[-1].append((array.shape, str(box)))
        return slice_bits(array, box)

    monkeypatch.setattr(saving, "slice_bits", record)
    for process in (0, 1):
        calls.append([])
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        saving.export_like_source(params, source, folders.plain / str(process), quantization="source")
    assert calls[0] == calls[1]
    assert bytes_of(folders.plain / "0") == bytes_of(folders.export) != bytes_of(folders.source)


@pytest.mark.parametrize("kind", ["nvfp4", "modelopt nvfp4"])
def test_a_number_that_the_scale_of_all_does_not_reach(folders, kind):
    """Then it is chosen anew, and with it those of all blocks."""
    _, wanted, made, changed = trained(folders, kind, 40.0)
    whole = "weight_global_scale" if kind == "nvfp4" else "weight_scale_2"
    assert f"{STEM}.{whole}" in changed
    largest = np.abs(wanted.reshape(wanted.shape[0], -1, 16)).max(-1, keepdims=True)
    error = np.abs(made - wanted).reshape(wanted.shape[0], -1, 16)
    # A scale is off by a sixteenth at most, or by half the smallest one.
    assert (error <= largest * (1 / 6 + 1 / 15) + np.abs(wanted).max() / 448 * 2.0**-9).all()


def encoded(format, values, block, scales):
    index = [np.arange(size) // step for size, step in zip(values.shape, block, strict=True)]
    blocks = arithmetic.Blocks(*index, tuple(int(one[-1]) + 1 for one in index))
    return format.encode(values, blocks, np.dtype(scales))


def spread_values(shape=(30, 64)):
    random = np.random.default_rng(0)
    values = random.standard_normal(shape) * 10.0 ** random.integers(-6, 3, (shape[0], 1))
    values[0] = 0
    values[1, :32] = np.abs(values[1, :32])
    values[2, :32] = -np.abs(values[2, :32])
    return values.astype(np.float32)


@pytest.mark.once
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_of_integers(bits, dtype):
    """Against the nearest numbers in float64: half of them negative, all from a zero point on, or symmetric."""
    values, top, middle = spread_values(), 2**bits - 1, 2 ** (bits - 1)
    groups = values.reshape(30, 2, 32).astype(np.float64)
    high, low = groups.max(-1), groups.min(-1)
    for zeros, symmetric, least in ((False, True, 0), (True, True, 0), (True, False, 0), (True, False, 1)):
        format = arithmetic.Integers(bits, zeros=zeros, symmetric=symmetric, least_zero=least)
        codes, scales, points = encoded(format, values, (1, 32), dtype)
        if symmetric:
            exact, point = np.maximum(high / (top - middle), -low / middle), np.full(high.shape, middle)
        else:
            exact = (np.maximum(high, 0) - np.minimum(low, 0)) / top
            point = np.clip(np.rint(-np.minimum(low, 0) / np.where(exact > 0, scales, 1)), least, top)
        tolerance = 2.0**-8 * exact + (2.0**-24 if dtype == np.float16 else 0)
        assert (np.abs(scales - exact)[exact > 0] <= tolerance[exact > 0]).all()
        assert (scales[exact == 0] == 1).all()
        np.testing.assert_array_equal(points if zeros else point, point)
        wide, wanted = scales.astype(np.float64)[..., None], groups
        best = np.clip(np.rint(wanted / wide) + point[..., None], 0, top)
        np.testing.assert_array_equal(codes.reshape(groups.shape), best)


@pytest.mark.once
def test_rounding_of_nvfp4():
    values = spread_values() * np.float32(50)
    codes, scales, _ = encoded(arithmetic.NVFP4(), values, (1, 16), E4M3)
    wide = FP8[scales.view(np.uint8)]
    largest = np.abs(values.reshape(30, 4, 16)).max(-1).astype(np.float64)
    exact = np.clip(np.where(largest > 0, largest / 6, 1), 2.0**-9, 448)
    np.testing.assert_array_equal(wide, FP8[nearest(exact, FP8)])
    wanted = nearest((values.reshape(30, 4, 16) / wide[..., None]).astype(np.float32), FP4)
    np.testing.assert_array_equal(codes.reshape(30, 4, 16), wanted)


@pytest.mark.parametrize("kind", ["int4", "awq", "modelopt nvfp4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite(folders, kind, value):
    with pytest.raises(UserError, match=rf"tensor {STEM}.weight: a value that is not finite has no place"):
        trained(folders, kind, value)


def test_a_value_too_large_for_the_scales(folders):
    with pytest.raises(
        UserError, match=rf"tensor {STEM}.weight: value .*e\+\d+ is too large for scales of dtype F16"
    ):
        trained(folders, "awq", 1e10)
