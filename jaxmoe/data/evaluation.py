"""Held-out text as batches in which every token is predicted once, and what guessing bytes would reach."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from jaxmoe.data.batches import BatchSpec
from jaxmoe.data.documents import Documents
from jaxmoe.data.tokenizer import DocumentEncoder
from jaxmoe.errors import UserError

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class _Window:
    """``length`` inputs from ``start`` of the token stream, each predicting the token after it."""

    start: int
    length: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out batches and the totals that turn their loss into bits per byte.

    With the loss in nats summed over all targets of all processes, bits per byte is
    loss / (ln 2 · ``num_bytes``).

    Attributes:
        batches: this process's batches, to be iterated any number of times; ``len`` gives how many.
        num_documents: documents covered: the first of those given.
        num_bytes: UTF-8 bytes of those documents, over all processes.
        num_targets: tokens predicted, over all processes.
    """

    batches: "EvaluationBatches"
    num_documents: int
    num_bytes: int
    num_targets: int


class EvaluationBatches:
    """Re-iterable batches: dict of int32 (B, T) tokens, segment_ids, positions and targets (-1: none)."""

    def __init__(
        self, stream: np.ndarray, batches: Sequence[Sequence[Sequence[_Window]]], shape: tuple[int, int]
    ):
        self._stream = stream
        self._batches = batches
        self._shape = shape

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self._fill, self._batches)

    def _fill(self, rows: Sequence[Sequence[_Window]]) -> dict[str, np.ndarray]:
        batch = {name: np.zeros(self._shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["targets"] = np.full(self._shape, -1, np.int32)
        for row, windows in enumerate(rows):
            end = 0
            for segment, window in enumerate(windows, 1):
                begin, end = end, end + window.length
                following = self._stream[window.start : window.start + window.length + 1]
                batch["tokens"][row, begin:end] = following[:-1]
                batch["targets"][row, begin:end] = following[1:]
                batch["segment_ids"][row, begin:end] = segment
                batch["positions"][row, begin:end] = np.arange(window.length)
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
        max_tokens: stop after the document that brings the number of targets to this; None takes all.

    Raises:
        UserError: ``max_tokens`` is below 1, or the documents have nothing to predict.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; expected at least 1, or none for all held-out text")
    context = spec.eos if spec.context is None else spec.context
    encode = DocumentEncoder(tokenizer, eos=spec.eos, context=context)
    T, B = spec.sequence_length, spec.batch_size
    pieces, windows = [], []
    start = num_bytes = num_targets = num_documents = 0
    for text in documents:
        tokens = encode(text)
        pieces.append(tokens)
        last = len(tokens) - 1
        windows += [_Window(start + at, min(T, last - at)) for at in range(0, last, T)]
        start += len(tokens)
        num_targets += max(last, 0)
        num_bytes += len(text.encode())
        num_documents += 1
        if max_tokens is not None and num_targets >= max_tokens:
            break
    if not windows:
        raise UserError(f"the {num_documents} held-out documents leave no token to predict; give longer text")
    rows = _first_fit(windows, T)
    count = -(-len(rows) // (B * process_count))
    mine = [rows[(b * process_count + process_index) * B :][:B] for b in range(count)]
    batches = EvaluationBatches(np.concatenate(pieces), mine, (B, T))
    return Evaluation(batches, num_documents, num_bytes, num_targets)


def _first_fit(windows: Sequence[_Window], T: int) -> list[list[_Window]]:
    """Puts each window into the first row that has room."""
    rows: list[list[_Window]] = []
    free = np.zeros(len(windows), np.int64)
    first_open = 0  # all rows before it are full
    for window in windows:
        fits = free[first_open : len(rows)] >= window.length
        row = first_open + int(fits.argmax()) if window.length < T and fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = T
        rows[row].append(window)
        free[row] -= window.length
        while first_open < len(rows) and not free[first_open]:
            first_open += 1
    return rows


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
    contents = (text.encode() for text in texts)
    left = max_bytes
    while left is None or left > 0:
        chunk, size = [], 0
        for content in contents:
            chunk.append(content if left is None else content[: left - size])
            size += len(chunk[-1])
            if size >= _CHUNK_BYTES or size == left:
                break
        if not size:
            break
        chunk = [content for content in chunk if content]
        following = np.frombuffer(b"".join(chunk), np.uint8).astype(np.int64)
        before = np.roll(following, 1)
        before[[0, *itertools.accumulate(map(len, chunk[:-1]))]] = 0
        counts += np.bincount(before * 256 + following, minlength=256 * 256)
        left = None if left is None else left - size
    return counts.reshape(256, 256)
