import itertools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxmoe.kernels.grouped_matmul import api, grouped_matmul, specs, xla
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


def run(x, weights, dy, group_sizes, backend="xla"):
    """(out, dx, dweights) of a backend."""
    out, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, backend=backend), x, weights)
    return out, *pull_back(dy)


run_jit = jax.jit(run, static_argnames="backend")


def assert_close(actual, expected, tolerance=3e-6):
    for name, ours, theirs in zip(("out", "dx", "dweights"), actual, expected, strict=True):
        assert ours.shape == theirs.shape, name
        scale = max(1.0, np.abs(theirs).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(ours).astype(np.float64), theirs, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("backend", ["xla", "reference"])
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
def test_matches_float64(group_sizes, rows, d_in, d_out, backend):
    operands = make_operands(rows, len(group_sizes), d_in, d_out)
    sizes = np.array(group_sizes, np.int32)
    assert_close(run_jit(*operands, jnp.asarray(sizes), backend=backend), exact(*operands, sizes))


@pytest.mark.parametrize("groups", [2, 16, 256])
@pytest.mark.parametrize("routing", specs.ROUTINGS)
def test_matches_float64_for_many_groups(groups, routing):
    rows = 611
    operands = make_operands(rows, groups, 12, 10)
    sizes = specs.make_group_sizes(routing, rows, groups)
    assert_close(run_jit(*operands, jnp.asarray(sizes)), exact(*operands, sizes))


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("filled", list(itertools.product([0, 1], repeat=4)))
def test_every_pattern_of_empty_groups(filled, backend):
    x, weights, dy = make_operands(50, 4, 6, 10)
    sizes = np.array(filled, np.int32) * np.array([9, 17, 3, 21], np.int32)
    actual = run_jit(x, weights, dy, jnp.asarray(sizes), backend=backend)
    assert_close(actual, exact(x, weights, dy, sizes))
    assert not np.asarray(actual[2])[sizes == 0].any()
    assert not np.asarray(actual[0])[sizes.sum() :].any()
    assert not np.asarray(actual[1])[sizes.sum() :].any()


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_rows_without_a_group_do_not_leak(garbage, backend):
    x, weights, dy = make_operands(50, 3, 6, 10)
    sizes = np.array([20, 0, 13], np.int32)
    expected = exact(x, weights, dy, sizes)
    actual = run_jit(
        x.at[33:].set(garbage), weights, dy.at[33:].set(garbage), jnp.asarray(sizes), backend=backend
    )
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
    assert_close(
        actual, [np.asarray(a) for a in run_jit(*operands, jnp.array([20, 300, 5]), backend="reference")]
    )


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


def test_under_scan_and_checkpoint():
    layers, rows, groups, width = 3, 70, 4, 11
    x, _, dy = make_operands(rows, groups, width, width)
    weights = jnp.stack([make_operands(rows, groups, width, width, seed=seed)[1] for seed in range(layers)])
    sizes = jnp.array([[40, 0, 13, 7], [1, 2, 3, 64], [0, 0, 70, 0]], jnp.int32)

    def loss(x, weights, backend):
        layer = lambda x, inputs: (jnp.sin(grouped_matmul(x, *inputs, backend=backend)), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (weights, sizes))[0] * dy)

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    (value, actual), (reference_value, expected) = (
        value_and_grad(x, weights, b) for b in ("xla", "reference")
    )
    np.testing.assert_allclose(value, reference_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), actual, expected)
    assert all(jnp.any(gradient != 0) for gradient in actual)


def test_a_frozen_operand_costs_no_gradient():
    x, weights, dy = make_operands(64, 4, 5, 7)
    sizes = jnp.array([10, 0, 30, 5], jnp.int32)
    loss = lambda x, weights: jnp.sum(grouped_matmul(x, weights, sizes) * dy)
    compiled = lambda f: jax.jit(f).lower(x, weights).compile()
    loops = lambda f: str(compiled(f).as_text()).count(" while(")
    forward = loops(loss)
    assert forward > 0
    # The loss is linear, so that its gradient alone has no forward pass left.
    assert loops(jax.grad(loss, 0)) == forward
    assert loops(jax.grad(loss, 1)) == forward
    assert loops(jax.grad(loss, (0, 1))) == 2 * forward
    # Nor is the operand that only the missing gradient needs kept for the backward pass.
    kept = jax.vjp(lambda x: grouped_matmul(x, weights, sizes), x)[1]
    assert not any(leaf.shape == x.shape for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(axis_type, check_vma):
    shards = jax.device_count()
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(axis_type,))
    x, weights, dy = make_operands(40 * shards, 3, 6, 10)
    sizes = np.tile(np.array([17, 0, 20], np.int32), (shards, 1))
    by_row, replicated = PartitionSpec("data"), PartitionSpec()

    def local(x, weights, dy, sizes):
        step = jax.checkpoint(
            lambda total, _: (total + jnp.sum(grouped_matmul(x, weights, sizes[0]) * dy), None)
        )
        start = jnp.sum(x[:1, :1] * 0)
        return jax.lax.psum(jax.lax.scan(step, start, None, length=2)[0], "data")

    loss = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_row, replicated, by_row, by_row),
        out_specs=replicated,
        check_vma=check_vma,
    )
    place = lambda value, spec: jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
    operands = place(x, by_row), place(weights, replicated), place(dy, by_row), place(sizes, by_row)
    dx, dweights = jax.jit(jax.grad(loss, (0, 1)))(*operands)

    pieces = [
        exact(x[40 * s : 40 * (s + 1)], weights, dy[40 * s : 40 * (s + 1)], sizes[s]) for s in range(shards)
    ]
    np.testing.assert_allclose(dx, 2 * np.concatenate([piece[1] for piece in pieces]), atol=2e-5)
    np.testing.assert_allclose(dweights, 2 * np.sum([piece[2] for piece in pieces], axis=0), atol=1e-4)


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
        grouped_matmul(x, weights, jnp.array(sizes, jnp.int32))
    assert xla._matmul._cache_size() == before + 1


@pytest.mark.parametrize(
    ("x", "weights", "sizes", "error", "message"),
    [
        ((9, 4), (2, 5, 3), 2, ValueError, r"weights \(2, 5, 3\).*3, but.*x \(9, 4\) have 4"),
        ((9, 4), (2, 5, 4), 3, ValueError, r"hold 2 groups and group_sizes \(3,\) 3"),
        ((9, 4), (0, 5, 4), 0, ValueError, r"at least one group"),
        ((9,), (2, 5, 4), 2, ValueError, r"x is \(9,\)"),
        ((9, 4), (5, 4), 2, ValueError, r"weights \(5, 4\)"),
    ],
)
def test_shapes_are_checked(x, weights, sizes, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(jnp.zeros(x), jnp.zeros(weights), jnp.zeros(sizes, jnp.int32))


@pytest.mark.parametrize(
    ("x", "weights", "sizes", "message"),
    [
        ("bfloat16", "float32", "int32", "x is bfloat16 and weights are float32"),
        ("int32", "int32", "int32", "x is int32"),
        ("float32", "float32", "int16", "group_sizes are int16; expected int32"),
    ],
)
def test_dtypes_are_checked(x, weights, sizes, message):
    with pytest.raises(TypeError, match=message):
        grouped_matmul(jnp.zeros((9, 4), x), jnp.zeros((2, 5, 4), weights), jnp.zeros(2, sizes))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, xla"):
        grouped_matmul(jnp.zeros((9, 4)), jnp.zeros((2, 5, 4)), jnp.zeros(2, jnp.int32), backend="cuda")


def test_a_backend_that_cannot_is_passed_over_and_logged_once(monkeypatch, caplog):
    def weight_gradient(x, dy, group_sizes):
        raise NotImplementedError(f"{x.shape[1]} columns")

    picky = SimpleNamespace(matmul=xla.matmul, weight_gradient=weight_gradient)
    monkeypatch.setattr(api, "_BACKENDS", {"picky": picky, "xla": xla})
    operands = make_operands(30, 3, 6, 10)
    sizes = np.array([4, 0, 20], np.int32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close(run(*operands, jnp.asarray(sizes), backend=None), exact(*operands, sizes))
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_matmul: backend picky passes weight_gradient on to xla: 6 columns"
    ]
    with pytest.raises(NotImplementedError, match="6 columns"):
        run(*operands, jnp.asarray(sizes), backend="picky")


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
