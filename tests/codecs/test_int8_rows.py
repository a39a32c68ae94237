"""LLM.int8's weights against what bitsandbytes gives, and against the formula in float64."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.codecs import int8_rows

GIVEN = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text())["int8_rows"]
BF16 = ml_dtypes.bfloat16
PLACES = {"numpy": np.asarray, "jax": jnp.asarray}


@pytest.mark.parametrize("place", PLACES)
def test_codes_and_scales_of_bitsandbytes(place):
    values = ((((np.arange(240) * 7919) % 2003 - 1001) / 1001) ** 3).reshape(6, 40)
    values[2, 5] = 7.5
    packed = int8_rows.quantize(PLACES[place](values.astype(np.float16)))
    assert np.asarray(packed.codes).tobytes().hex() == GIVEN["codes"]
    np.testing.assert_array_equal(packed.absmax, np.array(GIVEN["row_absmax"], np.float32))


@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("place", PLACES)
def test_a_stack_with_a_row_of_zeros(place, dtype):
    values = np.random.default_rng(0).standard_normal((3, 5, 70)).astype(dtype)
    values[1, 2] = 0
    packed = int8_rows.quantize(PLACES[place](values))
    assert (packed.codes.dtype, packed.codes.shape, packed.absmax.shape) == (np.int8, (3, 5, 70), (3, 5))
    assert not np.asarray(packed.codes[1, 2]).any()
    wide = values.astype(np.float16).astype(np.float64)  # as bitsandbytes casts them
    largest = np.abs(wide).max(-1, keepdims=True)
    np.testing.assert_array_equal(packed.absmax, largest[..., 0])
    found = np.asarray(int8_rows.dequantize(packed, np.float32)).astype(np.float64)
    assert (np.abs(found - wide) <= largest / 254 * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_products_are_rounded_as_bitsandbytes_rounds_them(dtype):
    """code * scale, then times 1 / 127, each in float32."""
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (40, 99), np.int8)
    absmax = random.uniform(0.1, 3, 40).astype(np.float32)
    once = (codes.astype(np.float64) * absmax[:, None]).astype(np.float32)
    twice = (once.astype(np.float64) * np.float32(1 / 127)).astype(np.float32)
    assert (twice != (codes * (absmax[:, None] / np.float32(127)))).any()
    for make in PLACES.values():
        packed = int8_rows.Int8Rows(make(codes), make(absmax))
        np.testing.assert_array_equal(int8_rows.dequantize(packed, dtype), twice.astype(dtype))
