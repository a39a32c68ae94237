"""The elements of the array of a JSON text that comes piece by piece."""

import codecs
import json
from collections.abc import Iterator

from jaxmoe.errors import UserError, quote
from jaxmoe.json_lines import json_type, not_utf8

_REMEDY = "write it as .jsonl with one object per line, for example with jq -c '.[]'"
_WHITE = " \t\r\n"


def array_of_rows(chunks: Iterator[bytes], shown: str, most: int) -> Iterator[str]:
    """Each element of an array, or of the only array of objects in an object, as a line of JSON.

    Args:
        chunks: of UTF-8.
        shown: what messages call the text.
        most: bytes of an element, and characters of anything else in the object.

    Raises:
        UserError: it is no such text, or an element is larger.
    """
    text = _Text(chunks, shown, most)
    match text.next():
        case "[":
            yield from text.elements()
        case "{":
            yield from _in_object(text)
        case "":
            return
        case _:
            raise UserError(
                f"{shown}: a JSON {json_type(text.value())}, expected an array of objects; {_REMEDY}"
            )
    if text.next():
        raise UserError(f"{shown}: more than one JSON value, expected one array of objects; {_REMEDY}")


def _in_object(text: "_Text") -> Iterator[str]:
    found = None
    text.take("{")
    while text.next() != "}":
        key = text.value()
        text.take(":")
        if text.next() == "[" and text.after_bracket() == "{":
            if found is not None:
                raise UserError(
                    f"{text.shown}: an object with arrays of objects under {quote(found)} and {quote(key)}, "
                    f"expected one; {_REMEDY.replace('.[]', f'.{found}[]')}"
                )
            found = key
            yield from text.elements()
        else:
            text.value()
        if text.next() != "}":
            text.take(",")
    text.take("}")
    if found is None:
        raise UserError(
            f"{text.shown}: an object without an array of objects, expected one array of them; {_REMEDY}"
        )


class _Text:
    """A JSON text of which little is held."""

    def __init__(self, chunks: Iterator[bytes], shown: str, most: int):
        self.shown = shown
        self._chunks = chunks
        self._most = most
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._buffer = ""
        self._begin = 0  # of the last value
        self._at = 0
        self._before = 0  # characters that are not held any more
        self._bytes = 0  # that were decoded
        self._ended = False
        self._elements = 0

    def next(self) -> str:
        """The next character that is not white, which stays; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _WHITE:
                    return self._buffer[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more(1)

    def take(self, character: str) -> None:
        if self.next() != character:
            raise self._broken(f"Expecting {character!r}", self._at)
        self._at += 1

    def after_bracket(self) -> str:
        """The character that follows the next one; both stay."""
        while True:
            following = self._buffer[self._at + 1 :].lstrip(_WHITE)
            if following or self._ended:
                return following[:1]
            self._more(len(self._buffer) - self._at + 1)

    def elements(self) -> Iterator[str]:
        """What an array has."""
        self.take("[")
        while self.next() != "]":
            self.value()
            element = self._buffer[self._begin : self._at].replace("\n", " ").replace("\r", " ")
            if len(element.encode()) > self._most:
                raise self._too_large()
            yield element
            self._elements += 1
            if self.next() != "]":
                self.take(",")
        self.take("]")

    def value(self) -> object:
        """The value that is next. The text of it is held until more is asked for."""
        self.next()
        while True:
            try:
                value, end = self._scan(self._buffer, self._at)
                # What ends with the buffer may go on after it, as numbers do.
                if end < len(self._buffer) or self._ended:
                    self._begin, self._at = self._at, end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._broken(error.msg, error.pos) from None
                if len(self._buffer) - self._at > self._most:
                    raise self._too_large(f" ({error.msg} at character {self._before + error.pos})") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{self.shown} row {self._elements}: not readable as JSON ({error}); {_REMEDY}"
                ) from None
            self._more(2 * (len(self._buffer) - self._at))

    def _more(self, wanted: int) -> None:
        """Hold so many characters from here on, if there are."""
        parts = [self._buffer[self._at :]]
        self._before += self._at
        self._at = 0
        held = len(parts[0])
        while held < wanted and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            try:
                parts.append(self._decoder.decode(chunk, final=self._ended))
            except UnicodeDecodeError as error:
                raise not_utf8(error, self.shown, self._bytes) from None
            self._bytes += len(chunk)
            held += len(parts[-1])
        self._buffer = "".join(parts)

    def _broken(self, reason: str, at: int) -> UserError:
        return UserError(
            f"{self.shown}: not JSON ({reason} at character {self._before + at}, in row {self._elements}); "
            "mend the file"
        )

    def _too_large(self, reason: str = "") -> UserError:
        return UserError(
            f"{self.shown} row {self._elements}: does not end within {self._most:,} bytes, the most that is read of a "
            f"row{reason}; mend, shorten or remove it, or raise the data's max_record_bytes"
        )
