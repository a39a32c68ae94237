"""FP8 and MXFP4: what they quantise is what checkpoints are written with, the same from jax and from numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.codecs import four_bit, fp8_blocks, unpack
from jaxmoe.interop.quantization.arithmetic import FP8, MXFP4, Blocks


def values(rows, columns, seed=0):
    """Of very different sizes, with zeros, and numbers halfway between two codes."""
    random = np.random.default_rng(seed)
    made = random.standard_normal((rows, columns)) * 2.0 ** random.integers(-60, 60, (rows, 1))
    made[0] = random.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -5], columns)
    made[1, ::3] = 0
    made[2] = 0
    return made.astype(np.float32)


def small():
    return np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)


def blocks_of(rows, columns, height, width):
    down, across = np.arange(rows) // height, np.arange(columns) // width
    return Blocks(down, across, (int(down[-1]) + 1, int(across[-1]) + 1))


@pytest.mark.parametrize("namespace", [np, jnp])
def test_mxfp4(namespace):
    given = values(11, 96)
    packed = four_bit.quantize(namespace.asarray(given), "mxfp4", 32)
    codes = np.concatenate([np.asarray(packed.codes) >> 4, np.asarray(packed.codes) & 15], -1).reshape(11, 96)
    expected = MXFP4().encode(given, blocks_of(11, 96, 1, 32), np.dtype(np.uint8))
    np.testing.assert_array_equal(packed.absmax, expected.scales)
    np.testing.assert_array_equal(codes, expected.codes)
    found = np.asarray(unpack(packed, jnp.float32))
    assert np.abs(found - given).max(axis=1)[3:].max() < np.abs(given).max()
    scales = np.ldexp(1.0, expected.scales.astype(int) - 127)[..., None]
    wide = found.reshape(11, 3, 32) / scales
    assert set(np.abs(wide).ravel()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert (np.abs(wide - given.reshape(11, 3, 32) / scales) <= 1).all()


@pytest.mark.parametrize("namespace", [np, jnp])
@pytest.mark.parametrize(("height", "width"), [(1, 16), (4, 16), (1, 40), (11, 40)])
def test_fp8(namespace, height, width):
    given = values(11, 40)
    packed = fp8_blocks.quantize(namespace.asarray(given), width, height)
    expected = FP8().encode(given, blocks_of(11, 40, height, width), np.dtype(np.float32))
    rows = np.arange(11) // height
    # XLA takes the reciprocal where one number divides many: the other neighbour, now and then.
    np.testing.assert_allclose(packed.scales, expected.scales[rows], rtol=1.2e-7 if namespace is jnp else 0)
    differ = np.asarray(packed.codes) != expected.codes
    assert differ.mean() <= (0.01 if namespace is jnp else 0)
    found = unpack(packed, jnp.float32)
    spread = np.repeat(packed.scales, width, 1)[:, :40]
    np.testing.assert_array_equal(
        found, np.asarray(packed.codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "packed",
    [
        four_bit.quantize(small(), "mxfp4", 32),
        four_bit.quantize(small(), "nf4", 32),
        fp8_blocks.quantize(small(), 24),
    ],
    ids=["mxfp4", "nf4", "fp8"],
)
def test_values_are_rounded_to_their_own_dtype_first(packed):
    """Also where another one is asked for; jax's are numpy's."""
    packed = dataclasses.replace(packed, dtype="float16")
    expected = np.asarray(unpack(dataclasses.replace(packed, dtype=None), jnp.float32))
    expected = expected.astype(np.float16).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        for arrays in (packed, jax.tree.map(jnp.asarray, packed)):
            found = unpack(arrays, jnp.dtype(dtype))
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, expected.astype(dtype))


def test_refusals():
    with pytest.raises(ValueError, match="block is 64, expected one of 32"):
        four_bit.quantize(values(4, 64), "mxfp4", 64)
