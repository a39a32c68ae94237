"""Held-out text as batches in which every token is predicted once, and what guessing bytes would reach."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from jaxmoe.data.batches import BatchSpec
from jaxmoe.data.documents import Documents
from jaxmoe.data.encoder import DocumentEncoder
from jaxmoe.errors import UserError

MAX_EVAL_TOKENS = 2**26
"""Held-out tokens are kept in memory, 4 bytes each, by every process."""

_MAX_EVAL_BYTES = 4 * MAX_EVAL_TOKENS
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Evaluation:
    """Held-out batches and the totals that turn their loss into bits per byte.

    With the loss in nats summed over all targets of all processes, bits per byte is
    loss / (ln 2 · ``num_bytes``).

    Attributes:
        batches: this process's batches, to be iterated any number of times; ``len`` gives how many.
        num_documents: elements covered, documents or parts of large ones: the first of those given.
        num_bytes: UTF-8 bytes of those documents, over all processes.
        num_targets: tokens predicted, over all processes.
    """

    batches: "EvaluationBatches"
    num_documents: int
    num_bytes: int
    num_targets: int


@dataclass(frozen=True)
class _Windows:
    """W windows, those of a row beside each other, the rows in order.

    Window w has ``length[w]`` inputs from ``start[w]`` of the token stream, each predicting the token after it. Row r
    has the windows from ``first[r]`` to ``first[r + 1]``.
    """

    stream: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.first) - 1


class EvaluationBatches:
    """Re-iterable batches: dict of int32 (B, T) tokens, segment_ids, positions and targets (-1: none)."""

    def __init__(self, windows: _Windows, batches: Sequence[range], shape: tuple[int, int]):
        self._windows = windows
        self._batches = batches  # the rows of each
        self._shape = shape

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self._fill, self._batches)

    def _fill(self, rows: range) -> dict[str, np.ndarray]:
        windows = self._windows
        batch = {name: np.zeros(self._shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["targets"] = np.full(self._shape, -1, np.int32)
        for row, number in enumerate(rows):
            end = 0
            for segment, w in enumerate(range(windows.first[number], windows.first[number + 1]), 1):
                start, length = windows.start[w], windows.length[w]
                begin, end = end, end + length
                following = windows.stream[start : start + length + 1]
                batch["tokens"][row, begin:end] = following[:-1]
                batch["targets"][row, begin:end] = following[1:]
                batch["segment_ids"][row, begin:end] = segment
                batch["positions"][row, begin:end] = np.arange(length)
        return batch


def evaluation_windows(
    documents: Documents | Sequence[str],
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Evaluation:
    """Cuts held-out documents into rows such that each of their tokens, EOS included, is predicted once.

    The first token of a document is predicted from the tokenizer's BOS, else ``spec.context``, else
    ``spec.eos``; with none of them it is not predicted. A document longer than T is cut into windows that
    share one token: the last target of one is the first input of the next. Windows share rows, first fit,
    as segments of their own. Documents keep their order and every process has equally many batches, the last
    ones filled with padding (segment 0). ``spec.seed`` and ``spec.packing`` play no part.

    All processes tokenize all the documents, and keep 4 bytes per token.

    Args:
        max_tokens: stop after the document (or part of one with more than 16 MiB) that brings the number of targets
            to this; None takes all.

    Raises:
        UserError: ``max_tokens`` is below 1, there are too many tokens to keep, or nothing to predict.
    """
    _check_size(documents, max_tokens)
    context = spec.eos if spec.context is None else spec.context
    encode = DocumentEncoder(tokenizer, eos=spec.eos, context=context)
    T, B = spec.sequence_length, spec.batch_size
    begins = documents.beginnings() if isinstance(documents, Documents) else np.ones(len(documents), bool)
    stream, starts, lengths = array("i"), array("q"), array("i")
    num_bytes = num_targets = num_documents = 0
    for i in range(len(documents)):
        tokens = encode.element(documents, i)
        # What goes on a document is predicted from the last token before it.
        start = len(stream) - (0 if begins[i] else 1)
        stream.frombytes(tokens.tobytes())
        targets = max(len(stream) - 1 - start, 0)
        offsets = np.arange(0, targets, T)
        starts.frombytes((start + offsets).astype(np.int64).tobytes())
        lengths.frombytes(np.minimum(T, targets - offsets).astype(np.int32).tobytes())
        num_targets += targets
        num_bytes += _num_bytes(documents, i)
        num_documents += 1
        if max_tokens is not None and num_targets >= max_tokens:
            break
        if len(stream) > MAX_EVAL_TOKENS:
            raise UserError(
                f"the first {begins[:num_documents].sum():,} held-out documents have {len(stream):,} tokens, expected "
                f"at most {MAX_EVAL_TOKENS:,}; limit them with data.eval_tokens, or give less"
            )
    if not starts:
        raise UserError(f"the {begins.sum()} held-out documents leave no token to predict; give longer text")
    windows = _in_rows(np.frombuffer(stream, np.int32), np.frombuffer(starts, np.int64), lengths, T)
    count = -(-windows.rows // (B * process_count))
    firsts = ((b * process_count + process_index) * B for b in range(count))
    mine = [range(min(first, windows.rows), min(first + B, windows.rows)) for first in firsts]
    batches = EvaluationBatches(windows, mine, (B, T))
    return Evaluation(batches, num_documents, num_bytes, num_targets)


def _check_size(documents: Documents | Sequence[str], max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; expected at least 1, or none for all held-out text")
    is_limited = max_tokens is not None and max_tokens <= MAX_EVAL_TOKENS
    if not is_limited and isinstance(documents, Documents) and documents.total_bytes > _MAX_EVAL_BYTES:
        raise UserError(
            f"{documents.total_bytes:,} bytes of held-out text, expected at most {_MAX_EVAL_BYTES:,}; limit what is "
            "evaluated with data.eval_tokens, or give less"
        )


def _num_bytes(documents: Documents | Sequence[str], i: int) -> int:
    return documents.num_bytes(i) if isinstance(documents, Documents) else len(documents[i].encode())


def _in_rows(stream: np.ndarray, start: np.ndarray, lengths: array, T: int) -> _Windows:
    row = first_fit(lengths, T)
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max() + 2))
    return _Windows(stream, start[order], np.frombuffer(lengths, np.int32)[order], first)


def first_fit(lengths: Sequence[int], T: int) -> np.ndarray:
    """int64 (W,): for each window the first row that has room, the rows being filled in that order."""
    rows = np.empty(len(lengths), np.int64)
    free = np.empty(len(lengths), np.int32)
    count = 0
    full_before: dict[int, int] = {}  # by length: rows get no emptier, so that none is looked at twice
    for i, length in enumerate(lengths):
        row = count
        if length < T:
            row = _first_with_room(free, full_before.get(length, 0), count, length)
            full_before[length] = row
        if row == count:
            free[row] = T
            count += 1
        rows[i] = row
        free[row] -= length
    return rows


def _first_with_room(free: np.ndarray, row: int, count: int, length: int) -> int:
    """The first of the rows from ``row`` on with so much room, ``count`` if none has."""
    step = 64
    while row < count:
        fits = free[row : min(row + step, count)] >= length
        if fits.any():
            return row + int(fits.argmax())
        row, step = row + step, 2 * step
    return count


def byte_baselines(
    train: Iterable[str], heldout: Iterable[str], *, max_train_bytes: int = 2**26
) -> dict[str, float]:
    """Bits per byte that byte counts reach on held-out text: what a model has to beat to have learned at all.

    Counts get one added (Laplace): unigram p(b) = (n_b + 1) / (N + 256), bigram
    p(b | a) = (n_ab + 1) / (n_a + 256), where a byte 0 stands before each document.

    Args:
        train: texts to count in, as far as ``max_train_bytes``.
        heldout: texts to predict; their ends are not predicted.

    Returns:
        {"unigram": bits per byte, "bigram": bits per byte}.

    Raises:
        UserError: either of them holds no text.
    """
    seen, heldout_pairs = _pair_counts(train, max_train_bytes), _pair_counts(heldout, None)
    if not seen.sum() or not heldout_pairs.sum():
        raise UserError("no text to count bytes in; expected training and held-out documents")
    unigram = (seen.sum(0) + 1) / (seen.sum() + 256)
    bigram = (seen + 1) / (seen.sum(1, keepdims=True) + 256)
    total = heldout_pairs.sum()
    return {
        "unigram": float(-(heldout_pairs.sum(0) * np.log2(unigram)).sum() / total),
        "bigram": float(-(heldout_pairs * np.log2(bigram)).sum() / total),
    }


def _pair_counts(texts: Iterable[str], max_bytes: int | None) -> np.ndarray:
    """int64 (256, 256): how often byte b follows byte a, at [a, b]."""
    counts = np.zeros(256 * 256, np.int64)
    pieces = _bytes_with_before(texts)
    left = max_bytes
    while left is None or left > 0:
        befores, chunk, size = [], [], 0
        for before, piece in pieces:
            befores.append((size, before))
            chunk.append(piece if left is None else piece[: left - size])
            size += len(chunk[-1])
            if size >= _CHUNK_BYTES or size == left:
                break
        if not size:
            break
        following = np.frombuffer(b"".join(chunk), np.uint8).astype(np.int64)
        preceding = np.roll(following, 1)
        places, values = zip(*befores, strict=True)
        preceding[list(places)] = values
        counts += np.bincount(preceding * 256 + following, minlength=256 * 256)
        left = None if left is None else left - size
    return counts.reshape(256, 256)


def _bytes_with_before(texts: Iterable[str]) -> Iterator[tuple[int, bytes]]:
    """Pieces of the texts, none empty or large, and the byte before each: 0 where a text begins."""
    for text in texts:
        content = text.encode()
        for at in range(0, len(content), _CHUNK_BYTES):
            yield content[at - 1] if at else 0, content[at : at + _CHUNK_BYTES]
