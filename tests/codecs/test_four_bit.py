"""nf4 and fp4 against what bitsandbytes gives (bitsandbytes.json), in numpy and jitted, and against plain formulas.

The JSON file has inputs by name (`inputs`), and of long results a digest alone.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.codecs import tables
from jaxmoe.codecs.four_bit import (
    Stored,
    dequantize,
    from_stored,
    plain,
    quantize,
    to_stored,
)

GIVEN = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text())
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float32": np.dtype(np.float32)}
TINY_TAIL = "zeros, a size that is no multiple"
THROUGH_ROWS = "row length not a multiple of 64: blocks run on through rows"


def base(n, a, m):
    return ((np.arange(n) * a) % m - (m // 2)) / (m // 2)


def cube(n):
    return base(n, 7919, 2003) ** 3


def inputs(name, shape):
    n = int(np.prod(shape))
    values = {
        "rows of two blocks": cube(n) * 0.05,
        THROUGH_ROWS: cube(n),
        "zero block between others": np.where(np.arange(n) // 64 == 1, 0, base(n, 37, 101)),
        TINY_TAIL: np.zeros(n),
        "expert stack": cube(n) * 0.02,
        "tiny values: absmax 1e-30": base(n, 37, 101) * 1e-30,
        "300 blocks: two nested blocks, the second short": cube(n) * (1 + (np.arange(n) // 64) % 7),
    }
    return values.get(name, base(n, 37, 101)).reshape(shape)


def same(found, expected):
    found = np.ascontiguousarray(np.asarray(found)).tobytes()
    if expected.startswith("sha256 "):
        assert f"sha256 {hashlib.sha256(found).hexdigest()}" == expected
    else:
        assert found.hex() == expected


def optimised(function, *args):
    """Jitted as users have it; most tests here run without LLVM's optimiser, which may round other than XLA says."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 3})(*args)


def in_numpy(function, *args):
    return function(*args)


def arrays(make, tree):
    return jax.tree.map(make, tree)


PLACES = {"numpy": (in_numpy, np.asarray), "jax": (optimised, jnp.asarray)}
CASES = [
    (place, case)
    for place in PLACES
    for case in GIVEN["cases"]
    if place == "numpy" or (case["nested"], case["quant_type"]) in ((True, "nf4"), (False, "fp4"))
]


@pytest.mark.parametrize(
    ("place", "case"), CASES, ids=[f"{p}-{c['name'][:12]}-{c['dtype']}-{c['quant_type']}" for p, c in CASES]
)
def test_every_byte_of_bitsandbytes(place, case):
    run, make = PLACES[place]
    kind, block, shape, dtype = case["quant_type"], case["blocksize"], case["shape"], DTYPES[case["dtype"]]
    values = make(inputs(case["name"], shape).astype(dtype))
    packed = run(lambda x: quantize(x, kind, block, case["nested"]), values)
    stored = to_stored(packed)
    assert isinstance(stored.codes, jax.Array) == (place == "jax")
    same(stored.codes, case["packed"])
    if place == "jax" and case["name"] == TINY_TAIL:  # XLA has no numbers like the tail's scale of 1e-38
        assert not np.asarray(dequantize(packed)).any()
        return
    if not case["nested"]:
        same(stored.absmax, case["absmax"])
    else:
        same(stored.absmax, case["scales"])
        offset = np.float32(float.fromhex(case["offset"]))
        one_bit = np.spacing(offset)
        assert abs(np.asarray(stored.offset) - offset) <= one_bit  # bitsandbytes' sum is in another order
        nested = np.frombuffer(bytes.fromhex(case["nested_absmax"]), np.float32)
        np.testing.assert_allclose(stored.nested_absmax, nested, rtol=0, atol=one_bit)
        theirs = np.frombuffer(bytes.fromhex(case.get("absmax_uint8", "")), np.uint8)
        theirs = theirs if len(theirs) else np.asarray(stored.absmax)
        stored = Stored(stored.codes, *arrays(make, (theirs, nested, offset)))
    packed = from_stored(stored, kind, block, tuple(shape))
    if case["nested"]:
        same(run(plain, packed).absmax, case["absmax_dequantized"])
    found = run(lambda one: dequantize(one, dtype), packed)
    assert (found.shape, found.dtype) == (tuple(shape), dtype)
    if case["name"] != THROUGH_ROWS:
        same(found, case["dequantized"])
    # On a CPU its library takes scales of other blocks where rows are no whole ones. Quantising, and GPUs, go by this.
    np.testing.assert_array_equal(found, flat_values(stored, kind, block, shape).astype(dtype))


def flat_values(stored, kind, block, shape):
    """By the formula, element after element."""
    codes, absmax = np.asarray(stored.codes).ravel(), np.asarray(stored.absmax)
    if stored.nested_absmax is not None:
        each = np.asarray(stored.nested_absmax)[np.arange(len(absmax)) // 256]
        absmax = np.frombuffer(bytes.fromhex(GIVEN["dynamic"]), np.float32)[absmax] * each + np.asarray(
            stored.offset
        )
    size = int(np.prod(shape))
    codes = np.stack([codes >> 4, codes & 15], -1).ravel()[:size]
    book = np.frombuffer(bytes.fromhex(GIVEN[kind]), np.float32)
    return (book[codes] * absmax[np.arange(size) // block]).reshape(shape)


@pytest.mark.once
def test_code_books():
    for kind in ("nf4", "fp4"):
        same(tables.VALUES[kind], GIVEN[kind])
    same(tables.DYNAMIC, GIVEN["dynamic"])


@pytest.mark.parametrize("place", PLACES)
def test_ties(place):
    """Midpoints of values and their neighbours on both sides; a midpoint gets the lower code."""
    run, make = PLACES[place]
    values = make(np.frombuffer(bytes.fromhex(GIVEN["ties"]["input"]), np.float32))
    same(to_stored(run(quantize, values)).codes, GIVEN["ties"]["packed"])


@pytest.mark.parametrize("place", PLACES)
def test_ties_of_scales(place):
    """A number between two values of the dynamic map gets the even code, as a search on a GPU leaves it."""
    run, make = PLACES[place]
    middles = (tables.DYNAMIC[:-1] + tables.DYNAMIC[1:]) * np.float32(0.5)
    codes = np.asarray(run(tables.nearest_dynamic, make(middles)))
    below = np.arange(255)
    np.testing.assert_array_equal(codes, below + below % 2)
    np.testing.assert_array_equal(run(tables.nearest_dynamic, make(tables.DYNAMIC)), np.arange(256))


def expected_codes(values, kind, block):
    """Nearest of the values in float64; far from ties that is what the float32 rule gives."""
    book = tables.VALUES[kind].astype(np.float64)
    flat = values.astype(np.float64).ravel()
    blocks = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    absmax = np.abs(blocks).max(-1)
    return np.abs((blocks / absmax[:, None])[..., None] - book).min(-1), absmax


@pytest.mark.once
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize(
    ("block", "shape"), [(32, (5, 96)), (128, (3, 7, 256)), (512, (9, 130)), (4096, (3, 5000))]
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_value_of_any_block(kind, block, shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    packed = quantize(values, kind, block)
    blocks = -(-int(np.prod(shape)) // block)
    whole = shape[-1] % block == 0
    assert packed.absmax.shape == ((*shape[:-1], shape[-1] // block) if whole else (blocks,))
    assert packed.codes.shape == (*packed.absmax.shape, block // 2)
    distance, absmax = expected_codes(values, kind, block)
    np.testing.assert_array_equal(packed.absmax.ravel(), absmax)
    scaled = (
        dequantize(packed, np.float32).astype(np.float64).ravel() / np.repeat(absmax, block)[: values.size]
    )
    error = np.abs(scaled - values.astype(np.float64).ravel() / np.repeat(absmax, block)[: values.size])
    assert (error <= distance.ravel()[: values.size] + 1e-6).all()
    assert error.max() > 0.1


def test_jax_repeats_numpy():
    """Long sums of scales included, where the order of additions counts."""
    values = np.random.default_rng(0).standard_normal((211, 1088)).astype(np.float32) ** 3
    ours, theirs = (
        optimised(lambda x: quantize(x, nested=True), jnp.asarray(values)),
        quantize(values, nested=True),
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for dtype in (BF16, np.float16, np.float32):
        found = optimised(lambda one, dtype=dtype: dequantize(one, dtype), ours)
        np.testing.assert_array_equal(found, dequantize(theirs, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("columns", [192, 96])
def test_experts_one_by_one(nested, columns):
    """Each of a stack is a tensor of its own; without double quantisation all in one are the same."""
    scale = np.array([1, 9, 3], np.float32)[:, None, None]
    values = np.random.default_rng(0).standard_normal((3, 10, columns)).astype(BF16) * scale.astype(BF16)
    stacked = optimised(jax.vmap(lambda x: quantize(x, nested=nested)), jnp.asarray(values))
    assert (stacked.stack, stacked.shape) == ((3,), (10, columns))
    found = optimised(dequantize, stacked)
    for number, one in enumerate(values):
        alone = quantize(one, nested=nested)
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda a, n=number: a[n], stacked))
        np.testing.assert_array_equal(found[number], dequantize(alone))
    fused = quantize(values, nested=nested)
    assert fused.stack == ()
    if columns % 64 == 0:
        np.testing.assert_array_equal(fused.codes, stacked.codes)
        assert (dequantize(fused) == np.asarray(found)).all() == (not nested)


def test_slices_of_rows_and_blocks_are_those_of_the_arrays():
    values = np.random.default_rng(0).standard_normal((12, 320)).astype(BF16)
    packed, whole = quantize(values), dequantize(quantize(values))
    part = dataclasses.replace(
        packed, codes=packed.codes[2:7, 1:3], absmax=packed.absmax[2:7, 1:3], shape=(5, 128)
    )
    np.testing.assert_array_equal(dequantize(part), whole[2:7, 64:192])


@pytest.mark.parametrize("shape", [(3, 5, 128), (7, 33), (9, 96), (1, 65)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.once
def test_stored_and_back(shape, nested):
    packed = quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32), "fp4", 64, nested)
    again = from_stored(to_stored(packed), "fp4", 64, shape)
    jax.tree.map(np.testing.assert_array_equal, again, packed)
    assert again.shape == packed.shape


@pytest.mark.once
def test_refusals(unchecked):
    values = np.ones((3, 64), np.float32)
    with pytest.raises(ValueError, match="kind is 'int4', expected 'nf4' or 'fp4'"):
        quantize(values, "int4")
    with pytest.raises(ValueError, match="block is 48, expected one of 32, 64"):
        quantize(values, "nf4", 48)
    with pytest.raises(ValueError, match=r"shape \(0, 64\), expected one with elements"):
        quantize(values[:0])
    with pytest.raises(TypeError, match="values of float64, expected bfloat16, float16 or float32"):
        quantize(values.astype(np.float64))
    stored = to_stored(quantize(values))
    with pytest.raises(
        ValueError, match=r"\[\(96, 1\), \(3,\)\], expected \[\(128, 1\), \(4,\)\] of a tensor"
    ):
        from_stored(stored, "nf4", 64, (4, 64))
    stacked = jax.vmap(quantize)(jnp.ones((2, 3, 64)))
    with pytest.raises(ValueError, match=r"a stack of \(2,\) tensors, expected one"):
        to_stored(stacked)


def near_a_middle(whole):
    """A scale and a number of which x * (1 / scale) and x / scale, in float32, lie on two sides of a middle."""
    middle = (tables.VALUES["nf4"][9] + tables.VALUES["nf4"][10]) / 2
    scales = np.random.default_rng(0).uniform(0.5, 1, 4096).astype(np.float32)
    for number in (middle * scales, np.nextafter(middle * scales, np.float32(2))):
        divided, multiplied = number / scales > middle, number * (np.float32(1) / scales) > middle
        for place in np.flatnonzero(divided != multiplied):
            return scales[place], number[place], 9 + (multiplied if whole else divided)[place]
    raise AssertionError("no such number")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_last_block_that_is_shorter_is_divided(place, whole):
    """Other blocks are multiplied by the reciprocal, as in bitsandbytes."""
    run, make = PLACES[place]
    scale, number, code = near_a_middle(whole)
    values = np.zeros((3, 64 if whole else 30), np.float32)
    values[-1, -2:] = scale, number
    codes = to_stored(run(quantize, make(values))).codes
    assert int(np.asarray(codes)[-1, 0]) == 15 * 16 + code


@pytest.mark.once
def test_the_mean_of_scales_to_one_bit():
    """Which sums of one number after the other do not have."""
    for seed in range(60):
        scales = np.random.default_rng(seed).uniform(0.5, 1.5, 1500).astype(np.float32)
        values = np.zeros((1500, 32), np.float32)
        values[:, 3] = scales
        exact = scales.astype(np.float64).mean().astype(np.float32)
        assert abs(quantize(values, "nf4", 32, nested=True).offset - exact) <= np.spacing(exact)


@pytest.mark.parametrize("place", PLACES)
def test_rounding_to_bfloat16(place):
    """To nearest and, in the middle of two, to even: code 15 leaves the scales as they are."""
    run, make = PLACES[place]
    bits = np.random.default_rng(0).integers(0x3000, 0x4800, 512).astype(np.uint32) << 16
    bits |= np.resize(np.array([0x8000, 0x7FFF, 0x8001, 0], np.uint32), 512)
    scales = bits.view(np.float32)
    stored = arrays(make, Stored(np.full((512 * 16, 1), 255, np.uint8), scales))
    found = run(dequantize, from_stored(stored, "nf4", 32, (512, 32)))
    np.testing.assert_array_equal(found, np.repeat(scales[:, None], 32, 1).astype(BF16))


@pytest.mark.once
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_differentiated_loop_over_layers_unpacks_one_of_them(kind):
    """What depends on no layer jax computes before the loop, and keeps: constants as large as what is unpacked."""
    layers = jax.vmap(lambda values: quantize(values, kind))(jnp.ones((3, 64, 64)))

    def loss(scale):
        def layer(x, packed):
            return jnp.sin(scale * x @ dequantize(packed, jnp.float32)), None

        return jax.lax.scan(layer, jnp.ones((2, 64)), layers)[0].sum()

    equations = jax.make_jaxpr(jax.grad(loss))(1.0).eqns
    around = [equation for equation in equations if equation.primitive.name != "scan"]
    assert len(around) < len(equations)
    assert max(output.aval.size for equation in around for output in equation.outvars) < 64 * 32
