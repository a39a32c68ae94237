"""Examples mixed, packed and resumed; and that a model learns from packs what it learns from each example alone."""

import dataclasses
import itertools
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.chat.encoder import Example
from jaxmoe.data.batches import BatchSpec
from jaxmoe.data.conversations import (
    MixedSource,
    StreamedRows,
    best_fit_decreasing,
    conversation_batches,
    held_out_batches,
    shares,
)
from jaxmoe.errors import UserError
from jaxmoe.interop.pretrained import from_config
from jaxmoe.model.batch import learning_batch
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.training.state import init_state
from jaxmoe.training.step import StepSpec, make_train_step

T = 48


class Rows:
    """Rows with no, one or two examples of random lengths; the first two ids say of which source and row they are."""

    def __init__(self, source, count, seed, longest=T, per_row=None):
        rng = np.random.default_rng(seed)
        self.rows = []
        for row in range(count):
            examples = []
            for _ in range(rng.integers(0, 3) if per_row is None else per_row):
                n = int(rng.integers(3, longest + 1))
                ids = rng.integers(10, 90, n).astype(np.int32)
                ids[:2] = source, row
                weights = rng.choice([0.0, 0.25, 1.0], n).astype(np.float32)
                weights[0], weights[-1] = 0.0, 1.0
                examples.append(Example(ids, weights))
            self.rows.append(examples)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    @property
    def tokens(self):
        return sum(len(example.ids) for row in self.rows for example in row)


def mixture(counts, seed=0, parts=None, **options):
    rows = [Rows(100 + n, count, seed + n, **options) for n, count in enumerate(counts)]
    parts = parts or shares(counts, [1.0] * len(counts), 1.0)
    sources = [
        MixedSource(f"s{n}", r, share, f"f{n}") for n, (r, share) in enumerate(zip(rows, parts, strict=True))
    ]
    return rows, sources


def batches_of(sources, *, packing=True, batch_size=2, seed=3, epoch_rows=24, **options):
    spec = BatchSpec(T, batch_size, packing=packing, seed=seed)
    return conversation_batches(sources, spec, epoch_rows=epoch_rows, threads=1, tokenizer="t", **options)


def examples_in(batch):
    """(ids, weights of each id as a target) of every segment of a batch."""
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert (np.diff(where) == 1).all()
            assert (batch["positions"][row, where] == np.arange(len(where))).all()
            targets, weights = batch["targets"][row, where], batch["weights"][row, where]
            ids = batch["tokens"][row, where]
            assert weights[-1] == 0.0
            assert targets[-1] == -1
            counted = weights[:-1] > 0
            assert (targets[:-1] == np.where(counted, ids[1:], -1)).all()
            yield ids, np.append(np.float32(0), weights[:-1])


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_whole_and_once_an_epoch(packing):
    (rows,), sources = mixture([57])
    wanted = sorted(example.ids.tolist() + example.weights.tolist() for row in rows.rows for example in row)
    found = []
    for batch in batches_of(sources, packing=packing, batch_size=3):
        found += [ids.tolist() + weights.tolist() for ids, weights in examples_in(batch)]
        if len(found) > 2 * len(wanted):
            break
    # Every example of the first epoch is among those up to the end of the second.
    assert all(found.count(example) in (1, 2, 3) for example in wanted)
    assert all(example in wanted for example in found)


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(5.9, 0.8, 6000)).astype(int), 8, 2048)
    rows = Rows(1, 1, 0)
    rows.rows = [[Example(np.ones(n, np.int32), np.ones(n, np.float32))] for n in lengths]
    batches = conversation_batches(
        [MixedSource("s", rows, 1.0, "f")],
        BatchSpec(2048, 16),
        epoch_rows=len(lengths),
        threads=1,
        tokenizer="t",
    )
    seen = list(itertools.islice(batches, int(lengths.sum()) // (2048 * 16)))
    filled = np.mean([batch["segment_ids"] > 0 for batch in seen])
    print(f"slots filled: {filled:.4f}")
    assert filled > 0.99
    # Rows are made longest examples first and must not come so: within a window many are no later than few.
    many = np.concatenate([batch["segment_ids"].max(axis=1) for batch in seen])[:200]
    assert abs(np.corrcoef(many, np.arange(200))[0, 1]) < 0.3


def test_state_continues_bit_for_bit_in_the_middle_of_a_pack():
    _, sources = mixture([57, 13, 31], parts=[0.5, 0.2, 0.3])
    whole = batches_of(sources)
    wanted = [next(whole) for _ in range(40)]
    for stop in (0, 1, 5, 6, 17, 39):
        stopped = batches_of(sources)
        for _ in range(stop):
            next(stopped)
        state = json.loads(json.dumps(stopped.get_state()))
        fresh = batches_of(sources)
        fresh.set_state(state)
        for batch in wanted[stop:]:
            following = next(fresh)
            assert all(np.array_equal(following[name], batch[name]) for name in batch)


def test_state_of_other_data_is_refused():
    _, sources = mixture([57, 13])
    state = batches_of(sources).get_state()
    other = [sources[0], MixedSource("s1", sources[1].rows, sources[1].share, "changed")]
    for changed, told in (
        ((other, {}), "sources was"),
        (([sources[0], dataclasses.replace(sources[1], share=0.5)], {}), "sources was"),
        ((sources, {"seed": 4}), "seed was 3 and is 4"),
        ((sources, {"packing": False}), "packing was True and is False"),
    ):
        with pytest.raises(UserError, match=told):
            batches_of(changed[0], **changed[1]).set_state(state)


def test_shares_hold_and_hosts_have_rows_of_their_own():
    counts = [64, 16, 32]
    _, sources = mixture(counts, parts=[0.5, 0.125, 0.375], per_row=1, longest=9)
    seen = {0: [], 1: []}
    for process in seen:
        batches = batches_of(sources, packing=False, process_index=process, process_count=2)
        for batch in itertools.islice(batches, 90):
            seen[process] += [tuple(ids[:2].tolist()) for ids, _ in examples_in(batch)]
    for keys in seen.values():
        found = np.bincount([source - 100 for source, _ in keys], minlength=3) / len(keys)
        np.testing.assert_allclose(found, [0.5, 0.125, 0.375], atol=0.04)
    for number, count in enumerate(counts):  # in the first epoch of each source
        first = [
            [row for source, row in keys if source == 100 + number][: count // 2] for keys in seen.values()
        ]
        assert sorted(first[0] + first[1]) == list(range(count))
    with pytest.raises(UserError, match="s1: 16 rows for 17 processes, expected at least one for each"):
        batches_of(sources, process_count=17)


def test_shares_by_size_epochs_and_temperature():
    assert shares([30, 10], [1, 1], 1.0) == pytest.approx([0.75, 0.25])
    assert shares([30, 10], [1, 6], 1.0) == pytest.approx([1 / 3, 2 / 3])
    assert shares([81, 1], [1, 1], 2.0) == pytest.approx([0.9, 0.1])


def test_best_fit_decreasing_against_the_definition():
    lengths = np.random.default_rng(1).integers(1, 30, 200).tolist()
    bins = best_fit_decreasing(lengths, 29)
    filled = [0] * len(bins)
    where = {item: number for number, items in enumerate(bins) for item in items}
    opened = 0
    for item in sorted(where, key=lambda i: (-lengths[i], i)):
        fitting = [n for n in range(opened) if filled[n] + lengths[item] <= 29]
        best = max((filled[n] for n in fitting), default=None)
        assert (where[item] == opened) if best is None else (filled[where[item]] == best)
        opened += best is None
        filled[where[item]] += lengths[item]
    assert sorted(where) == list(range(200))
    with pytest.raises(ValueError, match="an item of 30 in bins of 29"):
        best_fit_decreasing([3, 30], 29)


def test_streamed_rows_stop_or_are_left_out():
    rows = Rows(1, 4, 0, per_row=1)
    told = []

    def encode(i):
        return ([], [f"file line {i + 1}: bad"]) if i == 2 else (rows[i], [])

    stop = StreamedRows(encode, 4, skip=False, told=told.append)
    assert stop[1] == rows[1]
    with pytest.raises(UserError, match="^file line 3: bad$"):
        stop[2]
    assert not told
    assert StreamedRows(encode, 4, skip=True, told=told.append)[2] == []
    assert told == ["file line 3: bad"]


@pytest.fixture(scope="module")
def model():
    return from_config(
        families.config_json("mixtral", num_hidden_layers=2, vocab_size=104), "float32", seed=2
    )


def step_of(model, batch, accumulation, devices):
    """Loss and weights after one step of gradient descent, whose weights are gradients."""
    mesh = make_mesh(devices=jax.devices()[:1]) if devices == 1 else make_mesh(fsdp=devices)
    spec = StepSpec(model.spec, jnp.dtype("float32"), remat=False, aux_loss=0.0, z_loss=0.0)
    micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), learning_batch(**batch))
    with jax.set_mesh(mesh):
        step = make_train_step(spec, optax.sgd(1.0), optax.constant_schedule(1.0), None)
        everything = jax.tree.map(lambda _: True, model.spec.declared)
        weights = jax.tree.map(jnp.array, model.pure_params())
        state, metrics = step(init_state(weights, optax.sgd(1.0), everything, 0, mesh), micro)
        return float(metrics["loss"]), jax.tree.map(np.asarray, state.params)


def alone(batch, rows):
    """The examples of a batch, each in a row of its own, and rows of padding up to so many."""
    made = [(ids, weights) for ids, weights in examples_in(batch)]
    assert len(made) <= rows
    apart = {name: np.zeros((rows, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    apart["targets"], apart["weights"] = np.full((rows, T), -1, np.int32), np.zeros((rows, T), np.float32)
    for row, (ids, weights) in enumerate(made):
        n = len(ids)
        apart["tokens"][row, :n], apart["segment_ids"][row, :n] = ids, 1
        apart["positions"][row, :n] = np.arange(n)
        apart["targets"][row, : n - 1] = np.where(weights[1:] > 0, ids[1:], -1)
        apart["weights"][row, : n - 1] = weights[1:]
    return apart


def assert_same_step(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5 * max(1.0, np.abs(other).max()))


def test_packs_accumulation_and_devices_change_neither_loss_nor_gradients(model):
    _, sources = mixture([40], longest=20, per_row=2)
    batch = next(iter(batches_of(sources, batch_size=8)))
    assert batch["segment_ids"].max() > 1
    packed = step_of(model, batch, 1, 1)
    assert_same_step(step_of(model, alone(batch, 40), 1, 1), packed)
    for accumulation in (2, 4):
        assert_same_step(step_of(model, batch, accumulation, 1), packed)
    assert_same_step(step_of(model, batch, 1, 8), packed)
    # And they would differ if an example saw its neighbour.
    leaking = batch | {"segment_ids": np.minimum(batch["segment_ids"], 1)}
    assert step_of(model, leaking, 1, 1)[0] != pytest.approx(packed[0], rel=1e-4)


def test_held_out_batches_hold_every_example_once(model):
    rows = Rows(7, 23, 5, per_row=1)
    examples = [row[0] for row in rows.rows]
    wanted = sorted(example.ids.tolist() for example in examples)
    spec = BatchSpec(T, 3)
    halves = [held_out_batches("s", examples, spec, process_index=p, process_count=2) for p in range(2)]
    found = [ids.tolist() for half in halves for batch in half.batches for ids, _ in examples_in(batch)]
    assert sorted(found) == wanted
    assert len(halves[0].batches) == len(halves[1].batches)
    size = sum(batch["weights"].sum() for half in halves for batch in half.batches)
    assert halves[0].size == pytest.approx(size, rel=1e-6)
    with pytest.raises(UserError, match="s: no held-out example is left"):
        held_out_batches("s", [], spec)
