"""Tokenizing a long text piece by piece, with the ids that tokenizing it at once gives.

A text may be cut where its tokens separate: ids(left + right) = ids(left) + ids(right). Whether they do is asked of the
tokenizer itself, on windows of text around the place that begin and end at several characters, so that a chance
agreement of phase (in a run of one character, say) does not count: all must give the same tokens on both sides.

Within one word of byte-pair encoding this is a proof: a sequence of its tokens is the encoding of its text if and only
if every two neighbours are that of theirs, and those at a cut stood side by side in a window. (A first merge across a
border would also be the first one across it in the two neighbours alone.) Between words it rests on splitting rules
that look no farther than the window. Rules and models that may look farther are refused, and so is a place where the
tokens of a whole piece turn out to be others than those in the window.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from tokenizers import Tokenizer

from jaxmoe.data.documents import Part
from jaxmoe.data.formats import PART_BYTES
from jaxmoe.errors import UserError, first_line

_NEAR = 2**14
"""Bytes after the place asked for that are searched first, also for places within words."""

_REACH = PART_BYTES - 2**14
"""The farthest that a cut may be: the next one must come after it."""

_CONTEXT = 2**12
"""Bytes before a piece that are tokenized with it: it is not the beginning of a text."""

_WINDOW = 512  # characters on each side of a place that is asked about
_SHIFTS = (1, 2, _WINDOW // 2 + 1)
_TRIES = 64  # of each kind of place; with the distances that they have, these reach as far as a cut may be
_AGREE = 8  # tokens on each side that must be the same in all windows

_AT_END = 2  # tokens at an end of a window that may be there because it is one

_LETTER = r"[^\W\d_]"
_BETWEEN_WORDS = re.compile(rf"(?<={_LETTER})(?=\s{_LETTER})")
_BETWEEN_KINDS = re.compile(
    rf"(?<=\w)(?=\W)|(?<=[^\w\s])(?=[\w\s])|(?<={_LETTER})(?=\d)|(?<=\d)(?={_LETTER})"
)
# Normalizers and pre-tokenizers for which what is far away makes no difference.
_LOCAL = frozenset(
    [
        *(
            "Sequence",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Precompiled",
            "StripAccents",
            "Lowercase",
            "BertNormalizer",
        ),
        *(
            "Strip",
            "Prepend",
            "Replace",
            "ByteLevel",
            "Metaspace",
            "Split",
            "Whitespace",
            "WhitespaceSplit",
            "Digits",
        ),
        *("BertPreTokenizer", "Punctuation", "CharDelimiterSplit", "UnicodeScripts"),
    ]
)
_LOOKS_FAR = re.compile(r"\\[zZG]|\.[*+]|\.\{\d+,\}|\[\\s\\S\][*+]|\[\\S\\s\][*+]|\\[XK]")


class Source(Protocol):
    """A document of ``size`` bytes of UTF-8, of which ``read`` gives some, fewer at its ends."""

    @property
    def size(self) -> int: ...
    def read(self, begin: int, end: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    """A document in memory, or as much of it as is needed."""

    content: bytes
    size: int
    begin: int = 0  # of the content

    def read(self, begin: int, end: int) -> bytes:
        """Bytes of it."""
        return self.content[max(begin - self.begin, 0) : end - self.begin]


def around(part: Part) -> Bytes:
    """A part, and the bytes beside it that say where its tokens separate from theirs."""
    begin = max(part.begin - _CONTEXT, 0)
    return Bytes(part.read(begin, part.end + _REACH + _CONTEXT), part.size, begin)


@dataclass(frozen=True)
class Cut:
    """A place where tokens separate: the byte, and the id on each of its two sides."""

    at: int
    before: int
    after: int


class InseparableError(ValueError):
    """No place near byte ``at`` is known where tokens separate; the text says why."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at = at


class Pieces:
    """The ids of the pieces of a document, without those that a tokenizer puts around a text.

    Attributes:
        refusal: why the tokens of this tokenizer are never known to separate, None if they may be.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.refusal = _refusal(tokenizer)
        # Only there is a cut within a word known to be right. Unigram's ties depend on how sums are rounded.
        self._within_words = type(tokenizer.model).__name__ == "BPE"
        self._strips = any(t.lstrip or t.rstrip for t in tokenizer.get_added_tokens_decoder().values())

    def cut(self, source: Source, at: int) -> Cut:
        """The first place found from byte ``at`` on where tokens separate; the same whoever asks.

        Raises:
            InseparableError: none was found.
        """
        if self.refusal:
            raise InseparableError(at, self.refusal)
        searched = ((_NEAR, True), (_REACH, False))
        for reach, anywhere in searched:
            text, begin = _decode(source.read(at - _CONTEXT, at + reach + _CONTEXT), max(at - _CONTEXT, 0))
            first = len(_decode(source.read(begin, at), begin)[0])
            last = len(text) - (_WINDOW if at + reach + _CONTEXT < source.size else 1)
            for place in _candidates(text, first, last, anywhere and self._within_words):
                sides = self._sides(text, place)
                if sides is not None:
                    return Cut(begin + len(text[:place].encode()), *sides)
        raise InseparableError(at, "found none where they surely do")

    def ids(self, source: Source, first: Cut | None, last: Cut | None) -> list[int]:
        """The ids from one cut to another; None is an end of the document.

        Raises:
            InseparableError: they are others than those at the cuts.
        """
        begin = 0 if first is None else first.at
        end = source.size if last is None else last.at
        before, start = _decode(source.read(begin - _CONTEXT, begin), max(begin - _CONTEXT, 0))
        context, ids = self._encode([before, source.read(start, end).decode()])
        piece = ids[len(context) :]
        if ids[: len(context)] != context or (first and piece[:1] != [first.after]):
            raise InseparableError(begin, "those of a longer text are others")
        if last and piece[-1:] != [last.before]:
            raise InseparableError(end, "those of a longer text are others")
        return piece

    def _sides(self, text: str, place: int) -> tuple[int, int] | None:
        """The ids before and after a place where tokens separate, None where they may not."""
        begin, end = max(0, place - _WINDOW), min(len(text), place + _WINDOW)
        if self._strips and _in_long_blank(text[begin:place], text[place:end]):
            return None
        lefts = [begin + shift for shift in (0, *_SHIFTS) if begin + shift < place]
        rights = [end - shift for shift in (0, *_SHIFTS) if end - shift > place]
        spans = [(b, place) for b in lefts] + [(b, end) for b in lefts] + [(begin, e) for e in rights]
        ids = self._encode([text[b:e] for b, e in spans])
        left, whole, cut_short = ids[: len(lefts)], ids[len(lefts) : 2 * len(lefts)], ids[2 * len(lefts) :]
        count = len(left[0])
        right = whole[0][count:]
        before, after = left[0][_AT_END:][-_AGREE:], right[:-_AT_END][:_AGREE]
        separate = (
            all(
                w == part + right and _agree(part[::-1], before[::-1])
                for part, w in zip(left, whole, strict=True)
            )
            and all(w[:count] == left[0] and _agree(w[count:], after) for w in cut_short)
            and before
            and after
        )
        if not separate or not (self._within_words or self._between_words(text[begin:end], count)):
            return None
        return before[-1], after[0]

    def _between_words(self, text: str, count: int) -> bool:
        words = self._tokenizer.encode(text, add_special_tokens=False).word_ids
        return words[count - 1] != words[count]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode(self._tokenizer, texts, add_special_tokens=False)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """The ids of each text. Threads that call it run side by side.

    Raises:
        UserError: the tokenizer has no id for something in them.
    """
    try:
        # encode_batch_fast leaves out character offsets and, unlike encode, lets other threads run.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"the tokenizer cannot encode the text that starts {texts[0][:30]!r} ({first_line(error)}); "
            "use another tokenizer or leave the document out"
        ) from None
    return [encoding.ids for encoding in encodings]


def _agree(ids: Sequence[int], expected: Sequence[int]) -> bool:
    count = min(len(ids), len(expected))
    return ids[:count] == expected[:count]


def _decode(content: bytes, begin: int) -> tuple[str, int]:
    """The whole characters in bytes that begin at ``begin``, and where the first one begins."""
    rest = 0
    while rest < min(3, len(content)) and content[rest] & 0xC0 == 0x80:
        rest += 1
    return codecs.utf_8_decode(content[rest:], "strict", False)[0], begin + rest


def _candidates(text: str, first: int, last: int, anywhere: bool) -> Iterator[int]:
    """Places to ask about: those that most tokenizers separate at come first."""
    sparse = chain(*(_places(pattern, text, first, last) for pattern in (_BETWEEN_WORDS, _BETWEEN_KINDS)))
    dense = range(first, min(first + _TRIES, last)) if anywhere else ()
    return (place for place in chain(sparse, dense) if 0 < place < last and _is_apart(text, place))


def _places(pattern: re.Pattern[str], text: str, first: int, last: int) -> Iterator[int]:
    """Where a pattern matches, farther and farther from each other: what is against one may be against all near it."""
    place = first
    for tried in range(_TRIES):
        match = pattern.search(text, place, last)
        if match is None:
            return
        yield match.start()
        place = match.start() + 1 + tried**3 // 8


def _is_apart(text: str, place: int) -> bool:
    """Not within a line end, or a character with its marks, joiners and selectors."""
    before, after = text[place - 1], text[place]
    return before != "\r" and all(
        unicodedata.category(c)[0] != "M" and c != "\u200d" for c in (before, after)
    )


def _in_long_blank(before: str, after: str) -> bool:
    """Whether a token beyond the window, which strips, may take much of it."""
    taken = (len(before) - len(before.lstrip()), len(after) - len(after.rstrip()))
    return max(taken) > _WINDOW // 2


def _refusal(tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer's tokens are never known to separate."""
    if getattr(tokenizer.model, "dropout", None):
        return "it chooses tokens at random (dropout)"
    longest = max((len(t.content) for t in tokenizer.get_added_tokens_decoder().values()), default=0)
    if longest > _WINDOW // 4:
        return f"it has an added token of {longest} characters"
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer):
        for key, value in _settings(json.loads(part.__getstate__()) if part is not None else None):
            if key == "type" and value not in _LOCAL:
                return f"its {value} may depend on all text before"
            if key == "Regex" and _LOOKS_FAR.search(value):
                return f"its pattern {value!r} may look at all text after"
    return None


def _settings(state: Any) -> Iterator[tuple[str, str]]:
    """The settings of a part of a tokenizer, and of the parts that it has, that are words."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        if isinstance(value, str):
            yield str(key), value
        else:
            yield from _settings(value)
