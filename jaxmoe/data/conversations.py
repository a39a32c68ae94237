"""Training batches of examples from several sources: mixed, shuffled, packed, and resumable."""

import bisect
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from jaxmoe.chat.encoder import Example
from jaxmoe.data.batches import BATCHES_AHEAD, Batches, BatchSpec
from jaxmoe.data.evaluation import MAX_EVAL_TOKENS, first_fit
from jaxmoe.errors import UserError
from jaxmoe.model.batch import IGNORED

_WINDOW = 1024
"""Examples that are packed together: then 99.7 of 100 slots are filled (6,000 chats with a log-normal length)."""


class ExampleRows(Protocol):
    """Rows of a source, each with the examples that it gives; read from several threads."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> list[Example]: ...


@dataclasses.dataclass(frozen=True)
class MixedSource:
    """A source of a mixture.

    Attributes:
        name: that it is told from others by in a saved position.
        rows: what it has.
        share: of all rows that are read, any positive number.
        fingerprint: changes with whatever changes its examples.
    """

    name: str
    rows: ExampleRows
    share: float
    fingerprint: str


def shares(sizes: Sequence[int], epochs: Sequence[float], temperature: float) -> list[float]:
    """How often each source is read: (rows · epochs)^(1/temperature), normalised.

    1 reads every row equally often, but for ``epochs``; higher temperatures raise the share of small sources (Raffel
    et al. 2020, section 3.5.2, https://arxiv.org/abs/1910.10683).
    """
    grown = (np.array(sizes, float) * np.array(epochs, float)) ** (1.0 / temperature)
    return (grown / grown.sum()).tolist()


def conversation_batches(
    sources: Sequence[MixedSource],
    spec: BatchSpec,
    *,
    epoch_rows: int,
    threads: int,
    tokenizer: str,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of this process: dict of (B, T) arrays, those of `filled_row`.

    Sources take turns by their shares, which hold from the first rows on.
    Each is shuffled anew in every epoch of its own, in which every row goes to one process. Packed rows hold whole
    examples: about a thousand are taken at once, the longest first, and each put into the fullest row that has room
    (best-fit decreasing), and the rows shuffled. Unpacked rows hold one each.

    ``get_state()`` returns a small JSON-able dict, and ``set_state`` of it continues with the same batches bit for bit,
    in the middle of a pack too, which is packed again.

    Args:
        sources: at least one.
        spec: shape and seed; its eos and context play no part.
        epoch_rows: about how many examples all sources have: no more are packed together.
        threads: that read rows.
        tokenizer: hash that tells it from others.

    Raises:
        UserError: a source has fewer rows than there are processes; in ``set_state``, a state of other data.
    """
    # Not spec.seed itself: grain adds the epoch to it, so that seed 1 would repeat the epochs of seed 0.
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(spec.seed).generate_state(len(sources) + 1)]
    read = []
    for source, seed in zip(sources, seeds[1:], strict=True):
        if len(source.rows) < process_count:
            raise UserError(
                f"{source.name}: {len(source.rows)} rows for {process_count} processes, expected at least one "
                "for each: give more"
            )
        shuffled = grain.MapDataset.source(_Source(source.rows)).shuffle(seed=seed)
        read.append(shuffled[process_index::process_count].repeat())
    mixed = grain.MapDataset.mix(read, [source.share for source in sources]) if len(read) > 1 else read[0]
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(8 * threads, 16) if threads else 0
    )
    examples = grain.experimental.FlatMapIterDataset(mixed.to_iter_dataset(options), _Flatten())
    T = spec.sequence_length
    window = min(max(epoch_rows // process_count, 1), _WINDOW)
    if spec.packing:
        windows = examples.batch(window, batch_fn=list)
        rows = grain.experimental.FlatMapIterDataset(windows, _Pack(T, seeds[0]))
    else:
        rows = examples.map(lambda example: filled_row([example], T))
    batches = grain.experimental.ThreadPrefetchIterDataset(
        rows.batch(spec.batch_size, drop_remainder=True), prefetch_buffer_size=BATCHES_AHEAD
    )
    identity = {
        "sources": {source.name: [source.fingerprint, source.share] for source in sources},
        "tokenizer": tokenizer,
        "sequence_length": T,
        "packing": spec.packing,
        "window": window,
        "seed": spec.seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    return Batches(iter(batches), identity)


class _Source:
    """Rows as grain reads them."""

    def __init__(self, rows: ExampleRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> list[Example]:
        return self._rows[int(i)]


class _Flatten(grain.experimental.FlatMapTransform):
    """Rows that give several examples, or none."""

    max_fan_out = 2**31

    def flat_map(self, element: list[Example]) -> list[Example]:
        return element


class _Pack(grain.experimental.FlatMapTransform):
    """Examples that are taken at once, as rows of T."""

    max_fan_out = 2**31

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed

    def flat_map(self, element: list[Example]) -> list[dict[str, np.ndarray]]:
        rows = best_fit_decreasing([len(example.ids) for example in element], self._length)
        # Longest first is how they were filled. What tells these examples from the ones before are their own ids.
        drawn = np.random.default_rng([self._seed, *element[0].ids[:16], len(element[0].ids)])
        return [
            filled_row([element[i] for i in rows[row]], self._length) for row in drawn.permutation(len(rows))
        ]


def best_fit_decreasing(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of items in bins of size ``most``: the longest first, each into the fullest bin that has room.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, number of the bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > most:
            raise ValueError(f"an item of {length} in bins of {most}")
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            left, number = most, len(bins)
            bins.append([])
        else:
            left, number = room.pop(place)
        bins[number].append(item)
        bisect.insort(room, (left - length, number))
    return bins


def filled_row(examples: Sequence[Example], T: int) -> dict[str, np.ndarray]:
    """A row (T,) with examples side by side, as `jaxmoe.model.batch.learning_batch` takes it.

    Returns:
        int32 ``tokens``, ``segment_ids`` (from 1, padding is 0), ``positions`` and ``targets``, and their float32
        ``weights``: the token before each trained one predicts it.
    """
    tokens, segment_ids, positions = (np.zeros(T, np.int32) for _ in range(3))
    targets, weights, at = np.full(T, IGNORED, np.int32), np.zeros(T, np.float32), 0
    for segment, example in enumerate(examples, 1):
        n = len(example.ids)
        here, before = slice(at, at + n), slice(at, at + n - 1)
        tokens[here], segment_ids[here], positions[here] = example.ids, segment, np.arange(n)
        weights[before] = example.weights[1:]
        targets[before] = np.where(example.weights[1:] > 0, example.ids[1:], IGNORED)
        at += n
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions,
        "targets": targets,
        "weights": weights,
    }


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Examples of one source that the model is evaluated on.

    With the loss summed over all targets of all processes, its mean is loss / ``size``, in nats per token.

    Attributes:
        name: of the source.
        batches: this process's, each a dict of (B, T) arrays; to be iterated any number of times.
        size: the sum of all weights of all processes.
        examples: how many there are.
    """

    name: str
    batches: Sequence[Mapping[str, np.ndarray]]
    size: float
    examples: int


def held_out_batches(
    name: str,
    examples: Sequence[Example],
    spec: BatchSpec,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """Rows with examples side by side, first fit; every process has equally many batches, the last ones padded.

    Raises:
        UserError: there are none, or more tokens than are kept in memory.
    """
    tokens = sum(len(example.ids) for example in examples)
    if not examples:
        raise UserError(f"{name}: no held-out example is left to evaluate on, expected one: give more rows")
    if tokens > MAX_EVAL_TOKENS:
        raise UserError(
            f"{name}: {tokens:,} held-out tokens, expected at most {MAX_EVAL_TOKENS:,}; limit them with "
            "data.eval_tokens"
        )
    T, B = spec.sequence_length, spec.batch_size
    rows = first_fit([len(example.ids) for example in examples], T)
    filled: list[list[Example]] = [[] for _ in range(int(rows.max()) + 1)]
    for row, example in zip(rows, examples, strict=True):
        filled[row].append(example)
    count = -(-len(filled) // (B * process_count))
    firsts = [(b * process_count + process_index) * B for b in range(count)]
    batches = [_filled(filled[first : first + B], B, T) for first in firsts]
    # The first token of an example is no target, whatever its weight.
    size = sum(float(example.weights[1:].sum()) for example in examples)
    return HeldOut(name, batches, size, len(examples))


def _filled(rows: Sequence[Sequence[Example]], B: int, T: int) -> dict[str, np.ndarray]:
    made = [filled_row(rows[number] if number < len(rows) else (), T) for number in range(B)]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


class StreamedRows:
    """Examples of rows that are encoded when they are asked for.

    Args:
        encode: a row's number to its examples and the errors that were found.
        count: of rows.
        skip: leave rows out that cannot be used, instead of stopping at the first.
        told: called with each error of a row that is left out.
    """

    def __init__(
        self,
        encode: Callable[[int], tuple[list[Example], list[str]]],
        count: int,
        *,
        skip: bool,
        told: Callable[[str], Any],
    ):
        self._encode = encode
        self._count = count
        self._skip = skip
        self._told = told
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> list[Example]:
        examples, errors = self._encode(i)
        if errors and not self._skip:
            raise UserError(errors[0])
        if errors:
            with self._lock:
                self._told(errors[0])
        return examples
