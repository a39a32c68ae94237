"""Training batches: documents shuffled, sharded by process, tokenized, packed into rows, and resumable.

The state of an iterator is a position in the pipeline, not a count of batches: restoring it reads again only
the documents of the shuffle window (``_WINDOW_TOKENS``) that was open, wherever in the run that was.
"""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from jaxmoe.data.documents import Documents
from jaxmoe.data.encoder import DocumentEncoder
from jaxmoe.data.tokenizer import digest
from jaxmoe.errors import UserError

_log = logging.getLogger(__name__)

# The rows of a long document follow each other; shuffled within this many tokens, a batch mixes documents.
_WINDOW_TOKENS = 2**18
# Tokenizing releases the interpreter's lock, so two threads run side by side. Of large documents few are held.
_THREADS = 2
_DOCUMENTS_AHEAD = 8
_BYTES_AHEAD = 2**24
BATCHES_AHEAD = 2
"""Batches that are made while one is trained on."""
# A batch of so many tokens or fewer is there in seconds.
_FEW_TOKENS = 2**20
_MOST_REPEATS = 16


@dataclass(frozen=True)
class BatchSpec:
    """The shape and content of the batches of one process.

    Attributes:
        sequence_length: T, tokens in a row.
        batch_size: B, rows of this process in a batch.
        packing: True fills every row with documents one after the other and cuts where a row ends, so that
            nothing is padded and nothing is lost; False gives each document a row, cut or padded to T.
        seed: of the shuffling, from 0 to 2^32 - 1.
        eos: the token put after each document, if any.
        context: the token put before each document, if any. Without it the first token of a document is
            never a training target, because nothing comes before it.
    """

    sequence_length: int
    batch_size: int
    packing: bool = True
    seed: int = 0
    eos: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError(f"sequence_length is {self.sequence_length}; expected at least 2")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the data's seed is {self.seed}; expected 0 to {2**32 - 1}")


def training_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of this process: dict of int32 (B, T) ``tokens``, ``segment_ids`` and ``positions``.

    Segments number the pieces of documents in a row from 1, 0 is padding (token 0); positions count from 0 in
    each segment. Every epoch is shuffled anew, and in it every document goes to exactly one process (of a document of
    more than 16 MiB every part of 512 KiB, which is shuffled by itself and is a segment of its own). The rows of
    a packed epoch are shuffled once more within a window of at most about a quarter of a million tokens and
    never more than the epoch.

    ``get_state()`` returns a small JSON-able dict, the process's own, and ``set_state`` of it continues with the
    same batches bit for bit, in a new process too. ``batch_size`` may differ then; what else decides the
    order must not.

    Raises:
        UserError: fewer documents than processes; a batch out of proportion to the data; a document without any token
            (when it is read); in ``set_state``, a state of other data or another spec.
    """
    if not spec.packing and not documents.beginnings().all():
        documents = documents.subset(np.flatnonzero(documents.beginnings()))  # the rest would be cut off
    if len(documents) < process_count:
        raise UserError(
            f"{len(documents)} documents for {process_count} processes; expected at least one per process"
        )
    # Not spec.seed itself: grain adds the epoch to it, so that seed 1 would repeat the epochs of seed 0.
    shuffle_seed, window_seed = (int(s) >> 1 for s in np.random.SeedSequence(spec.seed).generate_state(2))
    check_proportion(documents, spec, process_count)
    tokenized = (
        grain.MapDataset.source(_TokenizedDocuments(documents, tokenizer, spec))
        .shuffle(seed=shuffle_seed)[process_index::process_count]
        .repeat()
    )
    ahead = min(_DOCUMENTS_AHEAD, max(_THREADS, _BYTES_AHEAD // max(documents.largest, 1)))
    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
    if spec.packing:
        tokens = tokenized.to_iter_dataset(read)
        rows = _packed_rows(tokens, spec.sequence_length, documents.total_bytes // process_count, window_seed)
    else:
        rows = tokenized.map(lambda document: _padded_row(document["tokens"], spec.sequence_length))
        rows = rows.to_iter_dataset(read)
    batches = grain.experimental.ThreadPrefetchIterDataset(
        rows.batch(spec.batch_size, drop_remainder=True), prefetch_buffer_size=BATCHES_AHEAD
    )
    identity = {
        "documents": documents.fingerprint(),
        "tokenizer": digest(tokenizer),
        "sequence_length": spec.sequence_length,
        "packing": spec.packing,
        "seed": spec.seed,
        "eos": spec.eos,
        "context": spec.context,
        "process_index": process_index,
        "process_count": process_count,
    }
    return _TextBatches(iter(batches), identity, tokenizer.get_vocab_size())


class _TokenizedDocuments:
    """Random-access source of {"tokens": int32 (n,)}, n >= 1."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, spec: BatchSpec):
        self._documents = documents
        self._encode = DocumentEncoder(tokenizer, eos=spec.eos, context=spec.context)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        tokens = self._encode.element(self._documents, i)
        if not tokens.size:
            raise UserError(
                f"{self._documents.where(i)}: the tokenizer turns this document into no tokens; leave it out"
            )
        return {"tokens": tokens}


class Batches(grain.DatasetIterator):
    """Adds to the state what it depends on, and repairs what JSON does to it.

    Args:
        batches: of one process.
        identity: what decides their order and content, by name.
    """

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
        super().__init__(batches)
        self._identity = identity
        weakref.finalize(self, _release, weakref.ref(self))

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"identity": dict(self._identity), "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        try:
            identity, position = self._completed(state["identity"]), state["position"]
            changed = {k: (identity[k], now) for k, now in self._identity.items() if identity[k] != now}
        except (KeyError, TypeError):
            raise UserError("the saved data position is not one of these batches; start without it") from None
        if changed:
            what = ", ".join(f"{k} was {then!r} and is {now!r}" for k, (then, now) in changed.items())
            raise UserError(
                f"the data cannot continue where the run stopped: {what}; restore that, or start a new run"
            )
        self._parent.set_state(_lists_to_tuples(position))

    def _completed(self, identity: dict[str, Any]) -> dict[str, Any]:
        """That of another version."""
        return identity

    def __str__(self) -> str:
        return type(self).__name__


class _TextBatches(Batches):
    """Batches of documents, whose state older versions wrote as well."""

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any], vocab_size: int):
        super().__init__(batches, identity)
        self._vocab_size = vocab_size

    def _completed(self, identity: dict[str, Any]) -> dict[str, Any]:
        """That of an older version, which told tokenizers by their size: tokens may have been added to one since."""
        if "tokenizer" in identity or identity["vocab_size"] > self._vocab_size:
            return {"tokenizer": f"one of {identity.get('vocab_size')} tokens", **identity}
        _log.warning(
            "the saved data position is of a version that did not note what ids text gets: that the tokenizer still "
            "gives the same ones is not checked"
        )
        return {**identity, "tokenizer": self._identity["tokenizer"]}


def _release(reference: "weakref.ref[Batches]") -> None:
    # For an iterator that lives until the interpreter exits: grain's threads would otherwise be closed after
    # the modules that closing needs, and say so in tracebacks.
    iterator = reference()
    if iterator is not None:
        iterator.close()
        iterator._parents = ()


def _lists_to_tuples(state: Any) -> Any:
    # grain's packing tells "no remainder" by comparing with a tuple: given JSON's list, it takes the next
    # document for a remainder of which nothing is left, and drops it.
    if isinstance(state, dict):
        return {key: _lists_to_tuples(value) for key, value in state.items()}
    return tuple(state) if isinstance(state, list) else state


def check_proportion(documents: Documents, spec: BatchSpec, process_count: int = 1) -> None:
    """Refuses a batch that would take minutes to fill with the same few documents over and over.

    Raises:
        UserError: it would repeat all of them many times.
    """
    rows = spec.batch_size * process_count
    tokens, there = rows * spec.sequence_length, documents.total_bytes
    repeats = tokens // there if spec.packing else rows // documents.num_documents
    if tokens > _FEW_TOKENS and repeats > _MOST_REPEATS:
        raise UserError(
            f"a batch of {rows:,} rows of {spec.sequence_length:,} tokens would repeat the {documents.num_documents:,} "
            f"documents ({there:,} bytes) {repeats:,} times, expected at most {_MOST_REPEATS}: lower the batch size or "
            "the sequence length, or give more text"
        )


def _packed_rows(tokens: grain.IterDataset, T: int, epoch_bytes: int, window_seed: int) -> grain.IterDataset:
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"tokens": T})
    # Text has fewer than 8 bytes per token with any common vocabulary: the window stays within an epoch.
    window = min(_WINDOW_TOKENS, epoch_bytes // 8) // T
    if window > 1:
        packed = grain.experimental.WindowShuffleIterDataset(packed, window_size=window, seed=window_seed)
    return packed.map(
        lambda row: {
            "tokens": row["tokens"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
        }
    )


def _padded_row(tokens: np.ndarray, T: int) -> dict[str, np.ndarray]:
    n = min(len(tokens), T)
    row = {name: np.zeros(T, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["tokens"][:n] = tokens[:n]
    row["segment_ids"][:n] = 1
    row["positions"][:n] = np.arange(n)
    return row
