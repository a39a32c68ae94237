"""Tensors of a quantised folder, read in parts: the bfloat16 values that they stand for."""

import numpy as np
import pytest
from helpers import quantize
from helpers.quantize import BF16
from helpers.quantized import (
    BFLOAT16,
    BLOCK,
    E8M0,
    any_fp8,
    any_mxfp4,
    assert_equal_bits,
    view_of,
)

pytestmark = pytest.mark.once  # Tables of values, and numpy arrays.


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, E8M0])
@pytest.mark.parametrize("shape", [(30, 56), (3, 30, 56), (7, 16), (8, 5)])
def test_fp8(tmp_path, shape, dtype):
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


def test_mxfp4(tmp_path):
    blocks, scales = any_mxfp4(3, 10, 96)
    files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales, "b": np.ones(3, np.float32)})
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
def test_bytes(tmp_path, chunk):
    blocks, scales = any_mxfp4(2, 3, 64)
    files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
    read = list(files.iter_bytes("a", chunk))
    assert max(map(len, read)) <= chunk
    values = np.frombuffer(b"".join(read), BF16).reshape(2, 64, 3)
    assert_equal_bits(values, quantize.dequantize_mxfp4(blocks, scales))


def test_rows_of_mxfp4_are_read_once(tmp_path):
    """Its order goes through all rows for each column."""
    blocks, scales = any_mxfp4(4, 10, 96)
    files = view_of(tmp_path, "mxfp4", {"a_blocks": blocks, "a_scales": scales})
    for _ in files.iter_bytes("a", 200):
        pass
    assert files.bytes_read == blocks.nbytes + scales.nbytes


def test_bands(tmp_path):
    """Whole blocks of rows, as many as fit."""
    codes, scales = any_fp8((2, 43, 5))
    files = view_of(tmp_path, "fp8", {"a": codes, "a_scale_inv": scales})
    for elements, height in ((1, 8), (100, 16), (1000, 43)):
        bands = list(files.bands(files.quantized["a"], elements))
        starts = [(e, row) for e in range(2) for row in range(0, 43, height)]
        assert [(e.start, rows.start) for e, rows, _ in bands] == starts
        np.testing.assert_array_equal(
            np.concatenate([codes.view(np.uint8)[band].ravel() for band in bands]),
            codes.view(np.uint8).ravel(),
        )
