"""Records as token ids and the weight of each in the loss."""

import collections
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import Conversation, Record, Segments, Tokens
from jaxmoe.chat.samples import Span, TrainOn
from jaxmoe.chat.templates import ChatTemplate
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError, first_line

_MAX_CONFIG_BYTES = 2**24
_FITTING = ("padding", "truncation")
"""What some tokenizer.json files have set for a use of their own; their padding would be trained."""

Long = Literal["truncate", "split", "drop"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence to train on.

    Attributes:
        ids: (n,) int32, n >= 2.
        weights: (n,) float32, of each id as a target; that of the first one is 0, because nothing comes before it.
    """

    ids: np.ndarray
    weights: np.ndarray


class Encoder:
    """Records → examples. Can be sent to another process; not safe to be used by several threads at once.

    Args:
        tokenizer: text to ids.
        template: of conversations; None where there are none.
        ends: the tokens that end turns and documents.
        train_on: what of conversations is trained.
        sequence_length: T, the most ids that an example may have.
        long: what becomes of one with more: its beginning is kept, it is cut into pieces of T, or it is left out.
        per_sequence: whether the weights of an example add up to 1, so that short ones count as much as long ones.
        vocab_size: V; ids that come with a row must be below it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        ends: EndTokens,
        train_on: TrainOn,
        sequence_length: int,
        *,
        long: Long = "truncate",
        per_sequence: bool = False,
        vocab_size: int | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._ends = ends
        self._train_on = train_on
        self._length = sequence_length
        self._long = long
        self._per_sequence = per_sequence
        self._vocab_size = vocab_size
        self.notes: collections.Counter[str] = collections.Counter()
        """What was left out, cut, or not as one would expect, and how often."""

    def settings(self) -> dict[str, Any]:
        """All that decides what it makes of a record."""
        return {
            # Not what is put around a text as it is written: one that was saved and read again has it in other words.
            "tokenizer": blake2b(self._bare.to_str().encode(), digest_size=16).hexdigest(),
            "begins": self._begins,
            "template": None if self._template is None else dataclasses.asdict(self._template),
            "ends": [self._ends.stops, sorted(self._ends.special), self._ends.document],
            "train_on": dataclasses.asdict(self._train_on),
            "length": self._length,
            "long": self._long,
            "per_sequence": self._per_sequence,
            "vocab_size": self._vocab_size,
        }

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        """Without what it puts around a text, some of which also cuts white space off the offsets."""
        return _without(self._tokenizer, "post_processor", *_FITTING)

    @functools.cached_property
    def _begins(self) -> list[int]:
        """The ids that the tokenizer puts before every text."""
        encoding = _without(self._tokenizer, *_FITTING).encode("a")
        return (
            encoding.ids[: encoding.special_tokens_mask.index(0)] if 0 in encoding.special_tokens_mask else []
        )

    @functools.cached_property
    def _separates(self) -> bool:
        """Whether ids of two texts, one after the other, are ids of the text that they make together."""
        first, second = (
            self._bare.encode(text, add_special_tokens=False).ids for text in ("One.\n", "\n  two")
        )
        return self._bare.decode([*first, *second], skip_special_tokens=False) == "One.\n\n  two"

    @functools.cached_property
    def _turns(self) -> TrainedTurns | None:
        return None if self._template is None else TrainedTurns(self._template, self._ends, self._train_on)

    def __call__(self, record: Record) -> list[Example]:
        """The examples that a record gives: none where it is left out, several where its turns have their own.

        Raises:
            UserError: nothing of it would be trained, or what would be is not known for sure.
        """
        examples = []
        for whole in self._whole(record):
            whole.weights[:1] = 0.0
            if not whole.weights.any():
                raise UserError(
                    "none of its tokens is trained, expected some: give it a turn or a text to train on"
                )
            examples += self._fitting(whole)
        return examples

    def _whole(self, record: Record) -> Iterator[Example]:
        """Of any length."""
        match record:
            case Tokens(ids, weights):
                if self._vocab_size is not None and (bad := [i for i in ids if i >= self._vocab_size]):
                    raise UserError(
                        f"found the id {bad[0]}, expected ids below the vocabulary's size of {self._vocab_size}: use "
                        "the tokenizer of the model"
                    )
                yield Example(np.array(ids, np.int32), np.array(weights, np.float32))
            case Segments(pieces, ends):
                yield self._segments([(piece.text, piece.weight or 0.0) for piece in pieces], ends)
            case Conversation():
                if self._turns is None:
                    raise UserError("a conversation, and there is no chat template: set data.chat_template")
                before = self._turns.notes.copy()
                samples = self._turns.samples(record)
                self.notes.update(self._turns.notes - before)
                for sample in samples:
                    yield self._tokens(sample.text, sample.spans, sample.prompts)

    def _segments(self, pieces: Sequence[tuple[str, float]], ends: bool) -> Example:
        spans, prompts, at, before = [], [], 0, 0.0
        for text, weight in pieces:
            if weight and text:
                spans.append(Span(at, at + len(text), weight))
                prompts += [at] if not before else []
            at, before = at + len(text), weight
        found = self._tokens("".join(text for text, _ in pieces), spans, prompts)
        ids, weights = [found.ids], [found.weights]
        count = len(self._begins)
        if found.ids[:count].tolist() != self._begins:
            ids.insert(0, np.array(self._begins, np.int32))
            weights.insert(0, np.zeros(count, np.float32))
        stop = self._stop
        if ends and stop is not None and found.ids[-1:].tolist() != [stop]:
            last = pieces[-1][1] if self._train_on.end_of_turn != "none" else 0.0
            ids.append(np.array([stop], np.int32))
            weights.append(np.array([last], np.float32))
        return Example(np.concatenate(ids), np.concatenate(weights))

    @functools.cached_property
    def _stop(self) -> int | None:
        return self._tokenizer.token_to_id(self._ends.document) if self._ends.document is not None else None

    def _tokens(self, text: str, spans: Sequence[Span], prompts: Sequence[int]) -> Example:
        """The ids of a text, and the weights of those that lie in a span.

        Where a token would lie half in a prompt and half in what goes on from it, as that of a line end of the template
        and one of the answer, the text is cut between them: that is what the model is served, and what it goes on with.
        """
        ids, begins, ends = self._encoded(text)
        if self._separates and (cuts := [at for at in prompts if _straddled(begins, ends, at)]):
            parts = [self._encoded(text[a:b], a) for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
            ids, begins, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        weights = np.zeros(len(ids), np.float32)
        for span in spans:
            first = np.searchsorted(ends, span.begin, "right")
            last = np.searchsorted(begins, span.end, "left")
            # A token with letters of what is not trained is not either, or a word that is to be avoided would be. White
            # space belongs to the word after it, or to the special token before that takes it in. After a prompt that
            # could not be cut off all that is said is trained.
            if first < last and span.begin not in prompts and text[begins[first] : span.begin].strip():
                first += 1
            if first < last and text[span.end : ends[last - 1]].strip():
                last -= 1
            weights[first:last] = span.weight
        return Example(ids, weights)

    def _encoded(self, text: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) int32 ids and int64 begins and ends in characters, the latter two nowhere falling."""
        try:
            encoding = self._bare.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(
                f"the tokenizer cannot encode its text ({first_line(error)}): leave it out"
            ) from None
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + offset
        return (
            np.array(encoding.ids, np.int32),
            np.maximum.accumulate(places[:, 0]),
            np.maximum.accumulate(places[:, 1]),
        )

    def _fitting(self, whole: Example) -> list[Example]:
        """What is left of an example that may be too long."""
        count, most = len(whole.ids), self._length
        if count <= most:
            return [self._weighted(whole)]
        if self._long == "drop":
            self.notes[f"longer than {most} tokens: left out"] += 1
            return []
        begins = range(0, count, most) if self._long == "split" else range(1)
        self.notes[f"longer than {most} tokens: {'split' if self._long == 'split' else 'cut off'}"] += 1
        pieces = [Example(whole.ids[b : b + most], whole.weights[b : b + most].copy()) for b in begins]
        for piece in pieces:
            piece.weights[:1] = 0.0
        kept = [piece for piece in pieces if piece.weights.any()]
        if not kept:
            self.notes[f"no trained token in the first {most}: left out"] += 1
        return [self._weighted(piece) for piece in kept]

    def _weighted(self, example: Example) -> Example:
        if not self._per_sequence:
            return example
        return Example(example.ids, example.weights / example.weights.sum())

    def __getstate__(self) -> dict[str, Any]:
        own = ("_bare", "_begins", "_separates", "_turns", "_stop")
        return {name: value for name, value in self.__dict__.items() if name not in own}


def _without(tokenizer: Tokenizer, *parts: str) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**state, **dict.fromkeys(parts)}))


def _straddled(begins: np.ndarray, ends: np.ndarray, at: int) -> bool:
    """Whether a token has characters on both sides of a place."""
    first = np.searchsorted(ends, at, "right")
    return bool(first < len(begins) and begins[first] < at)
