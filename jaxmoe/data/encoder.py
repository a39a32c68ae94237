"""Documents as token ids, long ones piece by piece."""

import contextlib
import itertools
import threading
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from jaxmoe.data.documents import Documents
from jaxmoe.data.formats import WHOLE_BYTES
from jaxmoe.data.pieces import Bytes, Cut, InseparableError, Pieces, Source, around, encode
from jaxmoe.errors import UserError

_AT_ONCE = 2**18
"""A text of so many bytes is tokenized in one call, which takes about 150 times as much memory."""

_AT_ONCE_IF_NEED_BE = WHOLE_BYTES
"""A text whose tokens are not known to separate is too, one at a time: no document in one element is refused."""

_PIECE = 2**17
"""A longer text is tokenized in pieces of this size: larger ones are slower, and in smaller ones cuts take longer."""


class DocumentEncoder:
    """Text → token ids: ``tokenizer.encode``'s, with the tokens that mark where a document starts and ends.

    Args:
        tokenizer: its own special tokens (a BOS that it puts before every text) are kept.
        eos: appended unless it is there already; None appends nothing.
        context: put before every document unless the tokenizer puts a BOS there itself; None puts nothing.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos: int | None, context: int | None = None):
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._one_large = threading.Lock()
        self._eos = [] if eos is None else [eos]
        self._context = [] if context is None else [context]
        # What the tokenizer puts around nothing starts with its BOS, or is an EOS that no text starts with.
        self._own_bos = tokenizer.encode("").ids[:1]

    def __call__(self, text: str) -> np.ndarray:
        """int32 (n,). Safe to call from several threads, which then run side by side."""
        if len(text) <= _AT_ONCE // 4 or len(content := text.encode()) <= _AT_ONCE:
            return self._whole(text)
        try:
            return self._in_pieces(Bytes(content, len(content)))
        except InseparableError as error:
            if len(content) > _AT_ONCE_IF_NEED_BE:
                raise UserError(
                    f"the document that starts {text[:30]!r} has {len(content):,} bytes: {_remedy(error)}"
                ) from None
        with self._one_large:
            return self._whole(text)

    def element(self, documents: Documents | Sequence[str], i: int) -> np.ndarray:
        """int32 (n,): element i, which may be a part of a document: those of its parts in a row are its ids."""
        if not isinstance(documents, Documents):
            return self(documents[i])
        part = documents.part(i)
        if part.is_first and part.is_last:
            return self(documents[i])
        documents.content(i)  # is what it was
        try:
            source = around(part)
            first = None if part.is_first else self._pieces.cut(source, part.begin)
            last = None if part.is_last else self._pieces.cut(source, part.end)
            return self._in_pieces(source, first, last)
        except InseparableError as error:
            raise UserError(f"{documents.where(i)}: {_remedy(error)}") from None
        except (OSError, UnicodeDecodeError):
            raise documents.changed(i) from None

    def _whole(self, text: str) -> np.ndarray:
        return self._marked(encode(self._tokenizer, [text], add_special_tokens=True)[0], True, True)

    def _in_pieces(self, source: Source, first: Cut | None = None, last: Cut | None = None) -> np.ndarray:
        """The ids from one cut to another; None is an end of the document."""
        ids = array("i")
        cuts = itertools.chain([first], self._cuts_between(source, first, last), [last])
        for ends in itertools.pairwise(cuts):
            ids.frombytes(self._piece(source, *ends).tobytes())
        return np.frombuffer(ids, np.int32)

    def _cuts_between(self, source: Source, first: Cut | None, last: Cut | None) -> Iterator[Cut]:
        begin = 0 if first is None else first.at
        end = source.size if last is None else last.at
        at = begin + _PIECE
        while at + _PIECE < end:
            try:
                cut = self._pieces.cut(source, at)
            except InseparableError:
                if at - begin > _AT_ONCE_IF_NEED_BE:
                    raise
                at += 4 * _PIECE
                continue
            if cut.at >= end:
                break
            yield cut
            begin, at = cut.at, cut.at + _PIECE
        if end - begin > _AT_ONCE_IF_NEED_BE:
            raise InseparableError(begin, "the rest is long")

    def _piece(self, source: Source, first: Cut | None, last: Cut | None) -> np.ndarray:
        size = (source.size if last is None else last.at) - (0 if first is None else first.at)
        with self._one_large if size > _AT_ONCE else contextlib.nullcontext():
            ids = self._pieces.ids(source, first, last)
        if first is None or last is None:
            begin = 0 if first is None else first.at
            head, tail = self._around(source.read(begin, begin + 1000).decode(errors="ignore"))
            ids = (head if first is None else []) + ids + (tail if last is None else [])
        return self._marked(ids, first is None, last is None)

    def _around(self, text: str) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, seen on some text."""
        encoding = self._tokenizer.encode(text)
        bare = self._tokenizer.encode(text, add_special_tokens=False).ids
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if not own or encoding.ids[own[0] : own[-1] + 1] != bare:
            raise InseparableError(0, "its own special tokens are not only at the ends")
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]

    def _marked(self, ids: list[int], begins: bool, ends: bool) -> np.ndarray:
        if begins and (not self._own_bos or ids[:1] != self._own_bos):
            ids = self._context + ids
        if ends and self._eos and ids[-1:] != self._eos:
            ids = ids + self._eos
        return np.array(ids, np.int32)


def check_separable(documents: Documents, tokenizer: Tokenizer) -> None:
    """Finds where the parts of large documents separate, which takes some milliseconds for each.

    Raises:
        UserError: somewhere they are not known to.
    """
    pieces = Pieces(tokenizer)
    for i in np.flatnonzero(~documents.beginnings()).tolist():
        part = documents.part(i)
        try:
            pieces.cut(around(part), part.begin)
        except InseparableError as error:
            raise UserError(f"{documents.where(i)}: {_remedy(error)}") from None


def _remedy(error: InseparableError) -> str:
    return (
        f"too large to be tokenized at once, and from byte {error.at} on no place is known where this tokenizer's "
        f"tokens separate ({error}); split the document there or use another tokenizer"
    )
