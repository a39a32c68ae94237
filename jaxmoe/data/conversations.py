"""Training batches of examples from several sources: mixed, shuffled, packed, and resumable."""

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

_MOST_BINS = 512
"""Rows that are filled side by side. With so many 99 of 100 slots are (8,000 chats with a log-normal length)."""


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
    return list(grown / grown.sum())


def conversation_batches(
    sources: Sequence[MixedSource],
    spec: BatchSpec,
    *,
    epoch_tokens: int,
    threads: int,
    tokenizer: str,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of this process: dict of (B, T) arrays, those of `as_row`.

    Sources take turns by their shares, which hold from the first rows on.
    Each is shuffled anew in every epoch of its own, and every row goes to one process. Packed rows are filled best fit
    (the fullest row that has room), some hundred side by side, and hold whole examples. Unpacked ones hold one each.

    ``get_state()`` returns a small JSON-able dict, and ``set_state`` of it continues with the same batches bit for bit,
    in the middle of a pack too, which is packed again.

    Args:
        sources: at least one.
        spec: shape and seed; its eos and context play no part.
        epoch_tokens: about how many tokens all sources have: no more rows are filled side by side than they fill.
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
        rows = grain.MapDataset.source(_Source(source.rows)).shuffle(seed=seed)
        read.append(rows[process_index::process_count].repeat())
    mixed = grain.MapDataset.mix(read, [source.share for source in sources]) if len(read) > 1 else read[0]
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(8 * threads, 16) if threads else 0
    )
    examples = grain.experimental.FlatMapIterDataset(mixed.to_iter_dataset(options), _Flatten())
    T = spec.sequence_length
    bins = int(min(max(epoch_tokens // process_count // T, 1), _MOST_BINS))
    if spec.packing:
        rows = grain.experimental.BestFitPackIterDataset(
            examples, length_struct={"tokens": T, "weights": T}, num_packing_bins=bins, seed=seeds[0]
        ).map(_packed)
    else:
        rows = examples.map(lambda example: _padded(example, T))
    batches = grain.experimental.ThreadPrefetchIterDataset(
        rows.batch(spec.batch_size, drop_remainder=True), prefetch_buffer_size=BATCHES_AHEAD
    )
    identity = {
        "sources": {source.name: [source.fingerprint, source.share] for source in sources},
        "tokenizer": tokenizer,
        "sequence_length": T,
        "packing": spec.packing,
        "bins": bins,
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

    def __getitem__(self, i: int) -> list[dict[str, np.ndarray]]:
        return [
            {"tokens": np.asarray(example.ids), "weights": np.asarray(example.weights)}
            for example in self._rows[int(i)]
        ]


class _Flatten(grain.experimental.FlatMapTransform):
    """Rows that give several examples, or none."""

    max_fan_out = 2**31

    def flat_map(self, element: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return element


def _packed(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return as_row(row["tokens"], row["weights"], row["tokens_segment_ids"], row["tokens_positions"])


def _padded(example: Mapping[str, np.ndarray], T: int) -> dict[str, np.ndarray]:
    n = len(example["tokens"])
    ids, weights = (np.pad(example[name], (0, T - n)) for name in ("tokens", "weights"))
    places = np.arange(T, dtype=np.int32)
    there = places < n
    return as_row(ids, weights, there.astype(np.int32), np.where(there, places, 0))


def as_row(
    tokens: np.ndarray, weights: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray
) -> dict[str, np.ndarray]:
    """A row as `jaxmoe.model.batch.learning_batch` takes it: the token before each trained one predicts it.

    Args:
        tokens, segment_ids, positions: (T,) int32.
        weights: (T,) float32, of each token as a target.

    Returns:
        The first three, ``targets`` (T,) int32 and their ``weights`` (T,) float32.
    """
    following = np.append(segment_ids[1:], 0) == segment_ids
    counts = np.where(following, np.append(weights[1:], 0), 0).astype(np.float32)
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions,
        "targets": np.where(counts > 0, np.append(tokens[1:], 0), IGNORED).astype(np.int32),
        "weights": counts,
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
    made = []
    for number in range(B):
        ids, segments, positions = (np.zeros(T, np.int32) for _ in range(3))
        weights, at = np.zeros(T, np.float32), 0
        for segment, example in enumerate(rows[number] if number < len(rows) else (), 1):
            n = len(example.ids)
            ids[at : at + n], weights[at : at + n] = example.ids, example.weights
            segments[at : at + n], positions[at : at + n] = segment, np.arange(n)
            at += n
        made.append(as_row(ids, weights, segments, positions))
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
