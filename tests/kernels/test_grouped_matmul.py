"""The grouped matmul and its gradients, one numpy product for each group in float64 beside them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxmoe.kernels.grouped_matmul import matmul, specs, weight_gradient, xla
from jaxmoe.kernels.grouped_matmul.tiles import RowBlocks, choose_row_blocks


def make_operands(
    rows, groups, d_in, d_out, dtype=jnp.float32, seed=0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, weights and a cotangent of the output, with entries that make outputs of order one."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.standard_normal(shape)
    x, weights, dy = draw(rows, d_in), draw(groups, d_out, d_in) / np.sqrt(d_in), draw(rows, d_out)
    return jnp.asarray(x, dtype), jnp.asarray(weights, dtype), jnp.asarray(dy, dtype)


def exact(x, weights, dy, group_sizes):
    """(out, dx, dweights) in float64, one numpy product for each group."""
    x, weights, dy = (np.asarray(value).astype(np.float64) for value in (x, weights, dy))
    out, dx, dweights = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weights)
    ends = np.cumsum(group_sizes)
    for group, (start, end) in enumerate(zip(ends - group_sizes, ends, strict=True)):
        out[start:end] = x[start:end] @ weights[group].T
        dx[start:end] = dy[start:end] @ weights[group]
        dweights[group] = dy[start:end].T @ x[start:end]
    return out, dx, dweights


def run(x, weights, dy, group_sizes):
    """(out, dx, dweights)."""
    return (
        matmul(x, weights, group_sizes, transpose=False),
        matmul(dy, weights, group_sizes, transpose=True),
        weight_gradient(x, dy, group_sizes),
    )


run_jit = jax.jit(run)


def assert_close(actual, expected, tolerance=3e-6):
    for name, ours, theirs in zip(("out", "dx", "dweights"), actual, expected, strict=True):
        assert ours.shape == theirs.shape, name
        scale = max(1.0, np.abs(theirs).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(ours).astype(np.float64), theirs, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(
    ("group_sizes", "rows", "d_in", "d_out"),
    [
        ([37], 37, 5, 7),
        ([3, 0, 11, 2, 1], 17, 19, 6),
        ([0, 0, 700, 0], 700, 24, 40),  # one group takes all, in more than one of the largest blocks
        ([129, 300, 1, 31, 65], 526, 33, 20),  # every block size, none of them filled
        ([256, 512], 768, 9, 16),  # filled blocks and nothing else
        ([5, 9], 40, 3, 160),  # rows without a group
        ([0, 0, 0], 21, 4, 6),
        ([1], 1, 2, 3),
        ([0, 0], 0, 4, 6),
    ],
)
def test_matches_float64(group_sizes, rows, d_in, d_out):
    operands = make_operands(rows, len(group_sizes), d_in, d_out)
    sizes = np.array(group_sizes, np.int32)
    assert_close(run_jit(*operands, jnp.asarray(sizes)), exact(*operands, sizes))


@pytest.mark.parametrize("groups", [2, 16, 256])
@pytest.mark.parametrize("routing", specs.ROUTINGS)
def test_matches_float64_for_many_groups(groups, routing):
    rows = 611
    operands = make_operands(rows, groups, 12, 10)
    sizes = specs.make_group_sizes(routing, rows, groups)
    assert_close(run_jit(*operands, jnp.asarray(sizes)), exact(*operands, sizes))


@pytest.mark.parametrize("filled", list(itertools.product([0, 1], repeat=4)))
def test_every_pattern_of_empty_groups(filled):
    x, weights, dy = make_operands(50, 4, 6, 10)
    sizes = np.array(filled, np.int32) * np.array([9, 17, 3, 21], np.int32)
    actual = run_jit(x, weights, dy, jnp.asarray(sizes))
    assert_close(actual, exact(x, weights, dy, sizes))
    assert not np.asarray(actual[2])[sizes == 0].any()
    assert not np.asarray(actual[0])[sizes.sum() :].any()
    assert not np.asarray(actual[1])[sizes.sum() :].any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_rows_without_a_group_do_not_leak(garbage):
    x, weights, dy = make_operands(50, 3, 6, 10)
    sizes = np.array([20, 0, 13], np.int32)
    expected = exact(x, weights, dy, sizes)
    actual = run_jit(x.at[33:].set(garbage), weights, dy.at[33:].set(garbage), jnp.asarray(sizes))
    assert_close(actual, expected)
    assert not np.asarray(actual[0])[33:].any()
    assert not np.asarray(actual[1])[33:].any()


def test_a_group_does_not_see_the_rows_of_the_next():
    x, weights, dy = make_operands(50, 2, 6, 10)
    sizes = np.array([20, 30], np.int32)
    expected = exact(x, weights, dy, sizes)
    out, dx, dweights = run_jit(x.at[20:].set(np.nan), weights, dy.at[20:].set(np.nan), jnp.asarray(sizes))
    assert_close((out[:20], dx[:20], dweights[:1]), (expected[0][:20], expected[1][:20], expected[2][:1]))


def test_what_goes_past_the_last_row_is_ignored():
    operands = make_operands(30, 3, 6, 10)
    actual = run_jit(*operands, jnp.array([20, 300, 5], jnp.int32))
    assert_close(actual, exact(*operands, np.array([20, 10, 0])))


def test_float64_is_accumulated_in_float64():
    sizes = np.array([140, 0, 33], np.int32)
    with jax.enable_x64(True):
        operands = make_operands(180, 3, 21, 13, jnp.float64)
        actual = run(*operands, jnp.asarray(sizes))
        assert all(array.dtype == jnp.float64 for array in actual)
        assert_close(actual, exact(*operands, sizes), tolerance=1e-14)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_error_is_bounded_by_the_naive_one(dtype):
    sizes = np.array([300, 1, 0, 99], np.int32)
    operands = make_operands(400, 4, 160, 48, dtype)
    actual = run_jit(*operands, jnp.asarray(sizes))
    expected = exact(*operands, sizes)
    x, weights, dy = operands
    group = np.repeat(np.arange(4), sizes)
    member = jnp.asarray(np.arange(4)[:, None] == group[None, :], dtype)
    naive = (
        jnp.einsum("rd,rfd->rf", x, weights[group]),
        jnp.einsum("rf,rfd->rd", dy, weights[group]),
        jnp.einsum("er,rf,rd->efd", member, dy, x),
    )
    error = lambda value, truth: np.sqrt(np.mean((np.asarray(value).astype(np.float64) - truth) ** 2))
    for name, ours, theirs, truth in zip(("out", "dx", "dweights"), actual, naive, expected, strict=True):
        assert ours.dtype == dtype, name
        assert error(ours, truth) <= 1.05 * error(theirs, truth), name
        # Accumulated in float32, so that rounding the result is all the error there is.
        assert error(ours, truth) <= 1.05 * error(truth.astype(dtype), truth), name


@pytest.mark.parametrize("transpose", [False, True])
def test_another_pair_is_added(transpose):
    x, weights, dy = make_operands(50, 4, 6, 10)
    low, to_out, _ = make_operands(50, 4, 3, 10, seed=1)
    _, to_in, _ = make_operands(50, 4, 6, 3, seed=2)
    sizes = np.array([9, 0, 33, 3], np.int32)
    # weights are (out, in): with `transpose` the low side is the out side.
    plus, own = (low, to_in if transpose else to_out), (dy if transpose else x)
    actual = jax.jit(lambda *a: matmul(*a, transpose=transpose, plus=plus))(own, weights, jnp.asarray(sizes))
    first = exact(x, weights, dy, sizes)[transpose]
    second = exact(low, to_out, dy, sizes)[0] if not transpose else exact(x, to_in, low, sizes)[1]
    np.testing.assert_allclose(actual, first + second, atol=1e-5)


def test_under_scan():
    layers, rows, groups, width = 3, 70, 4, 11
    x, _, dy = make_operands(rows, groups, width, width)
    weights = jnp.stack([make_operands(rows, groups, width, width, seed=seed)[1] for seed in range(layers)])
    sizes = jnp.array([[40, 0, 13, 7], [1, 2, 3, 64], [0, 0, 70, 0]], jnp.int32)

    def layer(x, inputs):
        out, *gradients = run(x, inputs[0], dy, inputs[1])
        return jnp.sin(out), (out, *gradients)

    _, actual = jax.jit(lambda x: jax.lax.scan(layer, x, (weights, sizes)))(x)
    for number in range(layers):
        expected = exact(x, weights[number], dy, sizes[number])
        assert_close([array[number] for array in actual], expected, 2e-5)
        x = np.sin(expected[0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(axis_type, check_vma):
    shards = jax.device_count()
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(axis_type,))
    x, weights, dy = make_operands(40 * shards, 3, 6, 10)
    sizes = np.tile(np.array([17, 0, 20], np.int32), (shards, 1))
    sizes[1] = 1, 30, 2
    by_row, replicated = PartitionSpec("data"), PartitionSpec()

    def local(x, weights, dy, sizes):
        out, dx, dweights = run(x, weights, dy, sizes[0])
        return out, dx, jax.lax.psum(dweights, "data")

    run_on_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_row, replicated, by_row, by_row),
        out_specs=(by_row, by_row, replicated),
        check_vma=check_vma,
    )
    place = lambda value, spec: jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
    operands = place(x, by_row), place(weights, replicated), place(dy, by_row), place(sizes, by_row)
    actual = jax.jit(run_on_mesh)(*operands)

    pieces = [
        exact(x[40 * s : 40 * (s + 1)], weights, dy[40 * s : 40 * (s + 1)], sizes[s]) for s in range(shards)
    ]
    out, dx, dweights = zip(*pieces, strict=True)
    assert_close(actual, (np.concatenate(out), np.concatenate(dx), np.sum(dweights, axis=0)), 1e-5)


def test_temporary_memory():
    # Were weights gathered by row or block, or rows masked by group, this would be tens of times more.
    x, weights, dy = make_operands(2048, 32, 64, 96)
    sizes = jnp.asarray(specs.make_group_sizes("zipf", 2048, 32))
    memory = jax.jit(run).lower(x, weights, dy, sizes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.nbytes + weights.nbytes + dy.nbytes


def test_eager_calls_compile_once():
    x, weights, _ = make_operands(23, 3, 5, 7)
    before = xla._matmul._cache_size()
    for sizes in ([1, 2, 3], [20, 0, 3]):
        matmul(x, weights, jnp.array(sizes, jnp.int32), transpose=False)
    assert xla._matmul._cache_size() == before + 1


@pytest.mark.parametrize("rows", [0, 1, 7, 32, 100, 5000])
@pytest.mark.parametrize("groups", [1, 256])
def test_row_blocks_fit_the_rows(rows, groups):
    sizes = choose_row_blocks(rows, groups).sizes
    assert all(size <= rows for size in sizes)
    assert bool(sizes) == (rows > 0)


@pytest.mark.parametrize("sizes", [(0, 8), (32, 8), (8, 8)])
def test_row_blocks_are_checked(sizes):
    with pytest.raises(ValueError, match="ascending"):
        RowBlocks(sizes)


def test_routings_fill_the_groups():
    for routing in specs.ROUTINGS:
        assert specs.make_group_sizes(routing, 1000, 10).sum() == 1000
    assert not specs.make_group_sizes("half_empty", 1000, 10)[1::2].any()
    assert (
        specs.make_group_sizes("zipf", 1000, 10).max()
        > 2 * specs.make_group_sizes("balanced", 1000, 10).max()
    )
    with pytest.raises(ValueError, match="routing is 'even'"):
        specs.make_group_sizes("even", 1000, 10)


def test_model_shapes():
    (shape,) = [model.gate_up(tokens=8192) for model in specs.MODELS if model.name == "Qwen3-30B-A3B"]
    assert (shape.rows, shape.groups, shape.d_in, shape.d_out) == (65536, 128, 2048, 1536)
    assert shape.flops == 2 * 65536 * 2048 * 1536
