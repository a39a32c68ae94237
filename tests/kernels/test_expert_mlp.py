"""The expert layer: what it computes, through the public function and the portable backend, against float64."""

import collections
import dataclasses
import functools
import itertools
import logging
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxmoe.codecs import four_bit, fp8_blocks, unpack
from jaxmoe.kernels.devices import Device, device_at_hand
from jaxmoe.kernels.expert_mlp import Activation, Experts, Lora, SlotDropout, api, expert_mlp, xla
from jaxmoe.kernels.expert_mlp.contract import Grads, Options
from jaxmoe.kernels.expert_mlp.dispatch import make_dispatch
from jaxmoe.kernels.expert_mlp.dropout import factors
from jaxmoe.kernels.expert_mlp.mosaic import backend
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.row_blocks import RowBlocks, choose_row_blocks, fold_blocks
from jaxmoe.kernels.expert_mlp.tuning.measured import Measured
from jaxmoe.kernels.logs import log_once

R, D, E, F, K = 29, 12, 5, 7, 2
ACTIVATIONS = [
    Activation("silu"),
    Activation("gelu_tanh"),
    Activation("swiglu_clamped", limit=0.6),
    Activation("relu2"),
]


def make_experts(draw, parts: int, held: int = E, *, biases: bool = True, ranks=(3, 4)) -> Experts:
    up, down = ranks
    return Experts(
        draw(held, parts, F, D),
        draw(held, D, F),
        draw(held, parts, F) if biases else None,
        draw(held, D) if biases else None,
        Lora(
            draw(held, up, D) if up else None,
            draw(held, parts, F, up) if up else None,
            draw(held, down, F) if down else None,
            draw(held, D, down) if down else None,
        ),
    )


def make_operands(activation=ACTIVATIONS[0], *, dtype=jnp.float32, num_experts=E, seed=0, **kwargs):
    """x, experts, chosen, weights and a cotangent of the output; no token chooses expert 2."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), dtype)
    offered = [expert for expert in range(num_experts) if expert != 2]
    chosen = jnp.asarray(np.stack([rng.permutation(offered)[:K] for _ in range(R)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.2, 1, (R, K)), dtype)
    return draw(R, D), make_experts(draw, activation.parts, **kwargs), chosen, weights, draw(R, D)


def run(backend, x, experts, chosen, weights, dout, activation=ACTIVATIONS[0], **kwargs):
    """The output and the gradients (x, experts, weights)."""
    function = lambda x, experts, weights: expert_mlp(
        x, experts, chosen, weights, activation=activation, lora_scale=0.7, backend=backend, **kwargs
    )
    out, pull_back = jax.vjp(function, x, experts, weights)
    return out, *pull_back(dout)


def run_jit(backend, operands, activation=ACTIVATIONS[0], **kwargs):
    return jax.jit(lambda operands: run(backend, *operands, activation=activation, **kwargs))(operands)


def in_float64(operands, activation=ACTIVATIONS[0], **kwargs):
    widen = lambda a: a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
    operands = jax.tree.map(lambda a: widen(np.asarray(a)), operands)
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run_jit("reference", operands, activation, **kwargs))


def by_hand(x, experts, chosen, weights, activation, scale, first=0, kept=(1.0, 1.0)):
    """(R, D) in numpy, one token and choice after the other; what is `kept` of both inputs of A is (R, K, …)."""
    kept_up, kept_down = (
        np.broadcast_to(one, (*weights.shape, n)) for one, n in zip(kept, (D, F), strict=True)
    )
    arrays = lambda tree: jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)
    x, experts, weights = arrays(x), arrays(experts), arrays(weights)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    out = np.zeros_like(x)
    for r, k in itertools.product(*map(range, weights.shape)):
        e = int(chosen[r, k]) - first
        if not 0 <= e < len(experts.down):
            continue
        lora = experts.lora
        h = experts.gate_up[e] @ x[r]
        if lora.gate_up_a is not None:
            h += scale * lora.gate_up_b[e] @ (lora.gate_up_a[e] @ (kept_up[r, k] * x[r]))
        h += 0 if experts.gate_up_bias is None else experts.gate_up_bias[e]
        if activation.name == "silu":
            a = h[0] * sigmoid(h[0]) * h[1]
        elif activation.name == "gelu_tanh":
            a = 0.5 * h[0] * (1 + np.tanh(np.sqrt(2 / np.pi) * (h[0] + 0.044715 * h[0] ** 3))) * h[1]
        elif activation.name == "swiglu_clamped":
            gate, up = np.minimum(h[0], activation.limit), np.clip(h[1], -activation.limit, activation.limit)
            a = gate * sigmoid(1.702 * gate) * (up + 1)
        else:
            a = np.maximum(h[0], 0) ** 2
        y = experts.down[e] @ a
        if lora.down_a is not None:
            y += scale * lora.down_b[e] @ (lora.down_a[e] @ (kept_down[r, k] * a))
        y += 0 if experts.down_bias is None else experts.down_bias[e]
        out[r] += weights[r, k] * y
    return out


def assert_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_flatten_with_path(expected)[0]
    for ours, (path, theirs) in zip(jax.tree.leaves(actual), leaves, strict=True):
        scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
        np.testing.assert_allclose(
            np.asarray(ours), theirs, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_reference_is_the_formula(activation):
    with jax.enable_x64(True):
        x, experts, chosen, weights, _ = make_operands(activation, dtype=jnp.float64, held=3, num_experts=6)
        actual = expert_mlp(
            x, experts, chosen, weights,
            activation=activation, lora_scale=0.7, num_experts=6, first=2, backend="reference",
        )  # fmt: skip
    expected = by_hand(x, experts, chosen, weights, activation, 0.7, first=2)
    np.testing.assert_allclose(actual, expected, atol=1e-13)


DROPOUT = SlotDropout(*(jax.random.key_data(jax.random.key(n)) for n in (3, 4)), rate=0.4)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_dropout_is_the_formula_with_a_mask_for_every_slot(backend):
    operands = make_operands(held=3, num_experts=6)
    x, experts, chosen, weights, _ = operands
    slots = jnp.arange(R * K, dtype=jnp.int32)
    kept = [
        np.asarray(factors(key, slots, width, 0.4)).reshape(R, K, width)
        for key, width in ((DROPOUT.up, D), (DROPOUT.down, F))
    ]
    assert np.unique(np.concatenate(kept, axis=-1).reshape(R * K, -1), axis=0).shape[0] == R * K
    assert {float(value) for value in np.unique(kept[0])} == {0.0, float(np.float32(1 / 0.6))}
    assert np.mean(kept[0] == 0) == pytest.approx(0.4, abs=0.05)
    layer = {"num_experts": 6, "first": 2, "lora_scale": 0.7, "backend": backend, "dropout": DROPOUT}
    actual = expert_mlp(x, experts, chosen, weights, **layer)
    expected = by_hand(x, experts, chosen, weights, ACTIVATIONS[0], 0.7, first=2, kept=kept)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("ranks", [(3, 4), (3, 0), (0, 4)])
def test_gradients_with_dropout_are_those_of_the_formula(ranks):
    operands = make_operands(ranks=ranks)
    expected = in_float64(operands, dropout=DROPOUT)
    assert_close(run_jit("xla", operands, dropout=DROPOUT), expected, 2e-5)
    others = dataclasses.replace(DROPOUT, up=DROPOUT.down, down=DROPOUT.up)
    assert np.abs(run_jit("xla", operands, dropout=others)[0] - expected[0]).max() > 0.01


ALL, SOME = (0, E, None), (1, 3, 8)  # first, held, num_experts
CASES = {
    "silu": (ACTIVATIONS[0], ALL, {"biases": False, "ranks": (0, 0)}),
    "gelu_tanh, biases, some experts": (ACTIVATIONS[1], SOME, {"ranks": (0, 0)}),
    "swiglu_clamped, everything": (ACTIVATIONS[2], ALL, {"ranks": (1, 6)}),
    "silu, everything, some experts": (ACTIVATIONS[0], SOME, {}),
    "relu2, LoRA of the first matrix": (ACTIVATIONS[3], SOME, {"biases": False, "ranks": (2, 0)}),
    "silu, LoRA of the second matrix": (ACTIVATIONS[0], ALL, {"biases": False, "ranks": (0, 3)}),
}


@pytest.mark.parametrize("case", CASES)
def test_portable_backend_matches_float64(case):
    activation, (first, held, num_experts), given = CASES[case]
    operands = make_operands(activation, held=held, num_experts=num_experts or held, **given)
    placed = {"num_experts": num_experts, "first": first}
    actual = run_jit("xla", operands, activation, **placed)
    assert_close(actual, in_float64(operands, activation, **placed), 3e-6)
    for gradient in jax.tree.leaves(actual[2]):
        assert not np.asarray(gradient[2 - first]).any(), "nobody chose expert 2"
        assert np.asarray(gradient).any()


@pytest.mark.parametrize("filled", list(itertools.product([0, 1], repeat=4)))
def test_every_pattern_of_experts_without_tokens(filled):
    """Groups of 0, 1 and more rows than the smallest block, in all orders, the last of them with rows after it."""
    x, experts, _, weights, dout = make_operands(held=4, num_experts=6)
    sizes = np.array(filled) * np.array([9, 1, 17, 8])
    of_slots = np.repeat([0, 1, 2, 3, 5], [*sizes, R * K - sizes.sum()])
    chosen = jnp.asarray(np.random.default_rng(3).permutation(of_slots).reshape(R, K), jnp.int32)
    operands = x, experts, chosen, weights, dout
    actual = run_by_sizes(operands)
    assert_close(actual, in_float64(operands, num_experts=6), 3e-6)
    for gradient in jax.tree.leaves(actual[2]):
        assert not np.asarray(gradient)[sizes == 0].any()


@jax.jit
def run_by_sizes(operands):
    return run("xla", *operands, num_experts=6)


def test_what_a_block_reads_past_its_rows_adds_nothing():
    """Not even where it is not a number: tokens of one expert, however bad, leave the weights of others alone."""
    x, experts, _, weights, dout = make_operands(num_experts=E)
    chosen = jnp.asarray(np.stack([np.arange(R) % 2, 3 + np.arange(R) % 2], axis=1), jnp.int32)
    bad = (chosen == 3).any(axis=1)
    good = run_jit("xla", (x, experts, chosen, weights, dout))
    actual = run_jit("xla", (x.at[bad].set(jnp.nan), experts, chosen, weights, dout))
    for ours, theirs in zip(jax.tree.leaves(actual[2]), jax.tree.leaves(good[2]), strict=True):
        np.testing.assert_array_equal(ours[4], theirs[4])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_first_may_be_traced():
    """As it is on a mesh, where each shard finds its own."""
    operands = make_operands(held=2, num_experts=6)
    actual = jax.jit(lambda first: run("xla", *operands, num_experts=6, first=first))(jnp.int32(3))
    assert_close(actual, run_jit("reference", operands, num_experts=6, first=3), 1e-5)


def test_nobody_chose_an_expert_that_is_held():
    operands = make_operands(held=1, num_experts=6)
    out, *gradients = run_jit("xla", operands, num_experts=6, first=2)
    assert not np.asarray(out).any()
    assert not any(np.asarray(gradient).any() for gradient in jax.tree.leaves(gradients))


def test_no_tokens():
    x, experts, chosen, weights, dout = make_operands()
    out, dx, dexperts, _ = run("xla", x[:0], experts, chosen[:0], weights[:0], dout[:0])
    assert out.shape == dx.shape == (0, D)
    assert not any(np.asarray(gradient).any() for gradient in jax.tree.leaves(dexperts))


def test_under_scan():
    layers = [make_operands(seed=seed) for seed in range(3)]
    x, *_, dout = layers[0]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(layer[1:4] for layer in layers))

    def layer(x, given):
        out, *gradients = run("xla", x, *given, dout)
        return jnp.sin(out), (out, *gradients)

    _, actual = jax.jit(lambda x: jax.lax.scan(layer, x, stacked))(x)
    for number, (_, *given, _) in enumerate(layers):
        expected = in_float64((x, *given, dout))
        assert_close(jax.tree.map(lambda array, n=number: array[n], actual), expected, 1e-5)
        x = np.sin(expected[0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(axis_type, check_vma):
    shards = jax.device_count()
    assert shards > 1
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(axis_type,))
    pieces = [make_operands(seed=seed) for seed in range(shards)]
    experts = pieces[0][1]
    x, chosen, weights, dout = (jnp.concatenate([piece[place] for piece in pieces]) for place in (0, 2, 3, 4))
    by_row, replicated = PartitionSpec("data"), PartitionSpec()

    def local(x, experts, chosen, weights, dout):
        if check_vma:
            experts = jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying"), experts)
        out, dx, dexperts, dweights = run("xla", x, experts, chosen, weights, dout)
        return out, dx, jax.lax.psum(dexperts, "data"), dweights

    specs = (by_row, replicated, by_row, by_row, by_row)
    on_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=(by_row, by_row, replicated, by_row),
        check_vma=check_vma,
    )
    place = lambda value, spec: jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
    operands = jax.tree.map(place, (x, experts, chosen, weights, dout), specs, is_leaf=lambda a: a is experts)
    assert_close(jax.jit(on_mesh)(*operands), in_float64((x, experts, chosen, weights, dout)), 1e-5)


def test_temporary_memory():
    """Were weights gathered by row or block, or all rows held between two products, this would be much more."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    tokens, top_k, width, hidden, count = 512, 3, 64, 96, 32
    experts = Experts(draw(count, 2, hidden, width), draw(count, width, hidden))
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :top_k], jnp.int32)
    x, weights = draw(tokens, width), draw(tokens, top_k)
    lowered = jax.jit(functools.partial(run, "xla")).lower(x, experts, chosen, weights, x)
    slots = tokens * top_k
    pre, rows = 4 * slots * 2 * hidden, 4 * slots * width
    gradients = experts.gate_up.nbytes + experts.down.nbytes
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.3 * (pre + 2 * rows) + gradients


def test_eager_calls_compile_once():
    x, experts, chosen, weights, _ = make_operands()
    before = xla.forward._cache_size()
    for shift in range(2):
        expert_mlp(x, experts, (chosen + shift) % E, weights, backend="xla")
    assert xla.forward._cache_size() == before + 1


@pytest.mark.parametrize("rows", [0, 1, 7, 32, 100, 5000])
@pytest.mark.parametrize("groups", [1, 256])
def test_row_blocks_fit_the_rows(rows, groups):
    first, *larger = choose_row_blocks(rows, groups).sizes or (0,)
    assert all(size <= rows for size in larger)
    assert bool(first) == (rows > 0)


@pytest.mark.parametrize("sizes", [(0, 8), (32, 8), (8, 8), (8, 20)])
def test_row_blocks_are_checked(sizes):
    with pytest.raises(ValueError, match="ascending multiples of the first"):
        RowBlocks(sizes)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, 75, 96])
def test_blocks_cover_a_group_in_order(length):
    start, sizes = 5, RowBlocks((8, 32))
    visited = jnp.full((start + 32 + length + sizes.padding,), -1)

    def visit(carry, block):
        visited, number = carry
        return block.put(visited, jnp.where(block.inside[:, 0], number, -2)), number + 1

    visited, count = fold_blocks(visit, (visited, 0), jnp.int32(start), jnp.int32(start + length), sizes)
    expected = np.repeat(np.arange(length // 32), 32)
    small = -(-(length % 32) // 8)
    assert count == length // 32 + small
    own = np.asarray(visited)[start : start + length]
    np.testing.assert_array_equal(own[: expected.size], expected)
    np.testing.assert_array_equal(own[expected.size :], length // 32 + np.arange(length % 32) // 8)
    assert not (np.asarray(visited)[:start] != -1).any()


PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_a", "gate_up_b", "down_a", "down_b")


def as_experts(arrays) -> Experts:
    """Of a dictionary by name."""
    get = arrays.get
    return Experts(*(get(name) for name in PARAMETERS[:4]), Lora(*(get(name) for name in PARAMETERS[4:])))


SUBSETS = [
    ("x",),
    ("weights",),
    ("gate_up", "gate_up_bias"),
    ("down", "down_bias"),
    ("gate_up_a", "down_b"),
    ("x", "weights", "gate_up_a", "gate_up_b", "down_a", "down_b"),
]


@pytest.mark.parametrize("wanted", SUBSETS, ids=" ".join)
def test_subsets_of_gradients(wanted, monkeypatch):
    """What is wanted is right; what is frozen costs no outer product, and tokens that are not wanted no sum."""
    x, experts, chosen, weights, dout = make_operands()
    arrays = {"x": x, "weights": weights}
    arrays |= dict(zip(PARAMETERS, jax.tree.leaves(experts), strict=True))
    calls = collections.Counter()

    def counted(name):
        function = getattr(xla, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(xla, name, call)

    jax.clear_caches()  # calls are counted as they are traced
    for name in ("_outer", "gather_sum"):
        counted(name)

    def loss(trained, backend):
        now = arrays | trained
        out = expert_mlp(now["x"], as_experts(now), chosen, now["weights"], lora_scale=0.7, backend=backend)
        return (out * dout).sum()

    trained = {name: arrays[name] for name in wanted}
    gradient = lambda backend: jax.jit(jax.grad(lambda trained: loss(trained, backend)))(trained)
    assert_close(gradient("xla"), gradient("reference"), 1e-5)
    matrices = {name for name in wanted if name in PARAMETERS and not name.endswith("bias")}
    assert calls["_outer"] == len(matrices) * len(choose_row_blocks(R * K, E).sizes)
    assert calls["gather_sum"] == 1 + ("x" in wanted)


def test_frozen_parameters_cost_nothing():
    x, experts, chosen, weights, dout = make_operands()
    layer = lambda x, experts, weights: (expert_mlp(x, experts, chosen, weights) * dout).sum()
    everything = jax.grad(layer, (0, 1, 2))
    of_lora = jax.grad(lambda lora, x, experts, weights: layer(x, experts._replace(lora=lora), weights))
    products = lambda function, *args: str(jax.make_jaxpr(function)(*args)).count("dot_general[")
    spared = products(everything, x, experts, weights) - products(of_lora, experts.lora, x, experts, weights)
    # Of every size of block: two matrices' outer products, two products that only the tokens' gradient needs, and one
    # that only the router's weights' needs.
    assert spared == 5 * len(choose_row_blocks(R * K, E).sizes)


def test_backward_returns_none_for_what_is_not_wanted():
    x, experts, chosen, weights, dout = make_operands()
    nothing = Grads(False, False, Experts(False, False, False, False, Lora(False, False, False, False)))
    dispatch, options = make_dispatch(chosen, E), Options(ACTIVATIONS[0], 0.7, device_at_hand())

    def backward(wanted):
        _, saved = xla.forward(options, x, experts, weights, dispatch, save=True)
        return xla.backward(options, x, experts, weights, dispatch, saved, dout, wanted)

    assert jax.tree.leaves(jax.eval_shape(lambda: backward(nothing))) == []
    down_alone = nothing._replace(experts=nothing.experts._replace(down=True))
    (gradient,) = jax.tree.leaves(jax.eval_shape(lambda: backward(down_alone)))
    assert gradient.shape == experts.down.shape


def test_bfloat16_error_is_bounded_by_the_naive_one():
    operands = make_operands(ACTIVATIONS[2], dtype=jnp.bfloat16)
    ours, naive = (run_jit(name, operands, ACTIVATIONS[2]) for name in ("xla", "reference"))
    exact = in_float64(operands, ACTIVATIONS[2])
    error = lambda value, truth: np.sqrt(np.mean(np.square(np.asarray(value).astype(np.float64) - truth)))
    leaves = jax.tree_util.tree_flatten_with_path(exact)[0]
    for (path, truth), value, by_naive in zip(
        leaves, jax.tree.leaves(ours), jax.tree.leaves(naive), strict=True
    ):
        assert value.dtype == jnp.bfloat16
        assert error(value, truth) <= 1.05 * error(by_naive, truth), jax.tree_util.keystr(path)


def test_forward_alone_is_the_same():
    x, experts, chosen, weights, dout = make_operands()
    alone = jax.jit(lambda x: expert_mlp(x, experts, chosen, weights, lora_scale=0.7))(x)
    np.testing.assert_allclose(alone, run_jit(None, (x, experts, chosen, weights, dout))[0], atol=1e-6)


@pytest.fixture
def unchecked_annotations():
    """Where annotations are checked, a function never sees what they refuse."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def with_lora(experts, **arrays):
    return experts._replace(lora=experts.lora._replace(**arrays))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, e, c, w: (x[0], e, c, w), ValueError, r"x is \(12,\)"),
        (lambda x, e, c, w: (x[:, :5], e, c, w), ValueError, r"gate_up is \(5, 2, 7, 12\); expected \(5, 2, 7, 5\)"),
        (lambda x, e, c, w: (x, e._replace(gate_up=e.gate_up[:, :1]), c, w), ValueError, "1 parts; expected 2"),
        (lambda x, e, c, w: (x, e._replace(down=e.down[..., :3]), c, w), ValueError, r"down is \(5, 12, 3\)"),
        (lambda x, e, c, w: (x, e._replace(down_bias=e.down_bias[:2]), c, w), ValueError, r"down_bias is \(2, 12\)"),
        (lambda x, e, c, w: (x, with_lora(e, down_b=None), c, w), ValueError, "one of down_a and down_b"),
        (lambda x, e, c, w: (x, with_lora(e, gate_up_a=None), c, w), ValueError, "one of gate_up_a and gate_up_b"),
        (lambda x, e, c, w: (x, with_lora(e, down_b=e.lora.down_b[..., :2]), c, w), ValueError, r"down_b is"),
        (lambda x, e, c, w: (x, e, c[:3], w), ValueError, r"chosen is \(3, 2\) and weights are \(29, 2\)"),
        (lambda x, e, c, w: (x[:3], e, c, w), ValueError, r"for x \(3, 12\)"),
        (lambda x, e, c, w: (x.astype("bfloat16"), e, c, w), TypeError, "gate_up is float32 and x is bfloat16"),
        (lambda x, e, c, w: (x, with_lora(e, down_a=e.lora.down_a.astype("float16")), c, w), TypeError, "is float16"),
        (lambda x, e, c, w: (x, e, c.astype("float32"), w), TypeError, "chosen is float32; expected int32"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_annotations")
def test_operands_are_checked(change, error, message):
    *operands, _ = make_operands()
    with pytest.raises(error, match=message):
        expert_mlp(*change(*operands))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of mosaic, reference, xla"):
        expert_mlp(*make_operands()[:4], backend="cuda")


@pytest.fixture
def logged(caplog):
    """Messages of one test, each of which may be logged anew."""
    log_once.cache_clear()
    caplog.set_level(logging.INFO, logger=api.__name__)
    yield lambda: [(record.levelname, record.getMessage()) for record in caplog.records]
    log_once.cache_clear()


H200 = Device("NVIDIA H200", "gpu", 132, (9, 0), present=True)
A100 = dataclasses.replace(H200, kind="NVIDIA A100", multiprocessors=108, capability=(8, 0))


def measured(monkeypatch, checked, **tiles):
    """On every kind of device."""
    monkeypatch.setattr(backend, "measured_on", lambda kind: Measured(kind, checked, tiles))


def test_elsewhere_the_portable_backend_is_used_and_a_line_says_so_once(logged):
    *operands, _ = make_operands()
    for _ in range(2):
        on_device = expert_mlp(*operands, device=A100)
        np.testing.assert_array_equal(on_device, expert_mlp(*operands, backend="xla"))
    message = (
        "expert_mlp: backend mosaic is not used: the kernels are for NVIDIA Hopper GPUs (H100, H200), "
        "this is NVIDIA A100"
    )
    assert logged() == [("INFO", message)]
    with pytest.raises(NotImplementedError, match="this is NVIDIA A100"):
        expert_mlp(*operands, backend="mosaic", device=A100)
    with pytest.raises(NotImplementedError, match="this is cpu"):
        expert_mlp(*operands, backend="mosaic")


def test_what_the_kernels_do_not_read_in_few_bits_is_unpacked_before_and_a_line_says_so_once(logged):
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    packed = lambda block, *shape: jax.vmap(lambda one: four_bit.quantize(one, block=block))(draw(*shape))
    experts = Experts(packed(64, 3, 2, 128, 64), packed(128, 3, 64, 192))
    for _ in range(2):
        readable = backend.readable(experts, jnp.bfloat16)
        assert readable.gate_up is experts.gate_up
        np.testing.assert_array_equal(readable.down, unpack(experts.down, jnp.bfloat16))
    message = (
        "expert_mlp: rows of 192 weights are no whole blocks of 128: the kernels do not read them; all experts "
        "(3, 64, 192) are unpacked first, into 0.1 MB, in the forward and again in the backward pass"
    )
    assert logged() == [("WARNING", message)]
    for other in (
        fp8_blocks.quantize(draw(3, 64, 256), 96),
        dataclasses.replace(packed(64, 3, 64, 256), dtype="float16"),
    ):
        readable = backend.readable(experts._replace(down=other), jnp.bfloat16)
        np.testing.assert_array_equal(readable.down, unpack(other, jnp.bfloat16))
    assert [text.split(": ")[1] for _, text in logged()[1:]] == [
        "blocks of 96 columns are no multiple of 64",
        "weights are rounded to float16 first",
    ]


def launches_of_kernels(device):
    """How many Mosaic kernels are in a forward pass, and in one with its gradients, that a CUDA device would run."""
    struct = lambda *sizes, dtype="bfloat16": jax.ShapeDtypeStruct(sizes, dtype)
    experts = Experts(struct(3, 2, 64, 128), struct(3, 128, 64))
    weights, chosen = struct(20, 2, dtype="float32"), struct(20, 2, dtype="int32")

    def layer(x, experts, weights, chosen):
        return expert_mlp(x, experts, chosen, weights, device=device)

    def both_ways(x, experts, weights, chosen):
        out, pull_back = jax.vjp(lambda *trained: layer(*trained, chosen), x, experts, weights)
        return out, pull_back(out)

    def count(function):
        traced = jax.jit(function).trace(struct(20, 128), experts, weights, chosen)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")

    return count(layer), count(both_ways)


def test_kernels_are_taken_as_checked_where_nothing_runs(logged):
    assert launches_of_kernels(dataclasses.replace(H200, present=False)) == (2, 6)
    assert logged() == []


def test_kernels_that_were_not_checked_are_not_used(logged):
    other_kind = dataclasses.replace(H200, kind="NVIDIA H200 of another world")
    assert launches_of_kernels(other_kind) == (0, 0)
    ((level, message),) = logged()
    assert level == "WARNING"
    assert "have not been checked on NVIDIA H200 of another world" in message
    assert "--check" in message


def test_kernels_that_were_checked_are_used(monkeypatch, logged):
    measured(monkeypatch, {jax.__version__: 1.0})
    assert launches_of_kernels(H200) == (2, 6)
    assert logged() == []


def test_kernels_read_experts_in_few_bits_as_they_are():
    """Four kernels forward and backward, and no array of all experts' weights in bfloat16 around them."""
    struct = lambda *sizes, dtype="bfloat16": jax.ShapeDtypeStruct(sizes, dtype)
    packed = lambda *sizes: jax.eval_shape(jax.vmap(four_bit.quantize), struct(*sizes))
    experts = Experts(packed(5, 2, 192, 320), packed(5, 320, 192))

    def both_ways(x, experts, weights, chosen):
        layer = lambda x: expert_mlp(
            x, experts, chosen, weights, device=dataclasses.replace(H200, present=False)
        )
        out, pull_back = jax.vjp(layer, x)
        return out, pull_back(out)

    operands = (struct(20, 320), experts, struct(20, 2, dtype="float32"), struct(20, 2, dtype="int32"))
    text = jax.jit(both_ways).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 4
    assert "1920x160xui8" in text
    sizes = [math.prod(map(int, found.split("x"))) for found in re.findall(r"tensor<([\dx]+)xbf16>", text)]
    assert 5 * 2 * 192 * 320 not in sizes
    assert 5 * 320 * 192 not in sizes


@pytest.mark.parametrize("present", [True, False])
def test_kernels_have_the_tiles_and_the_size_of_their_device(monkeypatch, present):
    tiles = {"a launch": {"out": 64}}
    measured(monkeypatch, {jax.__version__: 1.0}, **tiles)
    device = dataclasses.replace(H200, multiprocessors=114, present=present)
    assert backend.kernels_for(device) == Mosaic(multiprocessors=114, tiles=tiles)


def test_operands_that_the_kernels_cannot_take(monkeypatch, logged):
    measured(monkeypatch, {jax.__version__: 1.0})
    for dtype, reason in ((jnp.float32, "x is float32"), (jnp.bfloat16, "width 12 is no multiple of 64")):
        *operands, _ = make_operands(dtype=dtype)
        with pytest.raises(NotImplementedError, match=reason):
            expert_mlp(*operands, backend="mosaic", device=H200)
        jax.eval_shape(functools.partial(expert_mlp, device=H200), *operands)
    assert [(level, message.split(": ")[-1]) for level, message in logged()] == [
        ("WARNING", "the tensor cores take bfloat16 and float16, x is float32"),
        ("WARNING", "width 12 is no multiple of 64"),
    ]


def test_the_backend_of_the_forward_pass_does_the_backward_pass(monkeypatch, logged):
    picky = SimpleNamespace(
        forward=lambda options, x, *rest, save: xla.forward(options, 2 * x, *rest, save=save),
        backward=lambda options, x, *rest: jax.tree.map(
            lambda gradient: 3 * gradient, xla.backward(options, x, *rest)
        ),
    )
    monkeypatch.setattr(api, "_BACKENDS", {"picky": picky, "xla": xla})
    x, *rest = make_operands(biases=False, ranks=(0, 0))
    out, dx, *_ = run(None, x, *rest)
    expected, tripled, *_ = run("xla", 2 * x, *rest)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(dx, 3 * tripled, atol=1e-5)
    assert logged() == []
