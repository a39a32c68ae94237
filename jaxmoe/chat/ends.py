"""The tokens that end turns."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxmoe.errors import UserError, first_line
from jaxmoe.files import read_text

_MAX_CONFIG_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class EndTokens:
    """The tokens that end a turn.

    Attributes:
        stops: at which generation stops, the usual one first.
        special: all special tokens of the tokenizer.
        document: the one that ends a document; None where there is none.
    """

    stops: tuple[str, ...]
    special: frozenset[str]
    document: str | None = None

    @functools.cached_property
    def _any(self) -> re.Pattern[str]:
        longest_first = sorted({*self.special, *self.stops}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def trailing(self, text: str) -> list[tuple[int, int]]:
        """(begin, end) of those after which nothing but white space and others of them comes, in order."""
        found: list[tuple[int, int]] = []
        for match in self._any.finditer(text):
            if found and text[found[-1][1] : match.start()].strip():
                found = []
            found.append(match.span())
        return found if found and not text[found[-1][1] :].strip() else []

    def leading(self, text: str) -> str | None:
        """The one that a text begins with."""
        match = self._any.match(text)
        return match[0] if match else None

    def first(self, text: str) -> str | None:
        """The first one in a text."""
        match = self._any.search(text)
        return match[0] if match else None


def end_tokens(
    tokenizer: Tokenizer, folder: Path | None, document: int | None, given: Sequence[str] = ()
) -> EndTokens:
    """The tokens that end turns: those that are given, that generation_config.json stops at, and that end documents.

    Args:
        tokenizer: that has them.
        folder: of the model or the tokenizer, with a generation_config.json perhaps.
        document: id of the token that ends a document.
        given: texts of such tokens, the usual one first.

    Raises:
        UserError: a given token is none of the tokenizer, or generation_config.json is not readable.
    """
    stops = list(given)
    for token in given:
        if tokenizer.token_to_id(token) is None:
            raise UserError(
                f"train_on.end_tokens: {token!r} is no token of the tokenizer, expected one: add it or name another"
            )
    for token_id in [*_generation_stops(folder), *([] if document is None else [document])]:
        text = tokenizer.id_to_token(token_id)
        if text is not None and text not in stops:
            stops.append(text)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    ends_document = None if document is None else tokenizer.id_to_token(document)
    return EndTokens(tuple(stops), frozenset(special), ends_document)


def _generation_stops(folder: Path | None) -> list[int]:
    file = None if folder is None else folder / "generation_config.json"
    if file is None or not file.is_file():
        return []
    try:
        config: Any = json.loads(read_text(file, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({first_line(error)}); mend or remove it") from None
    ids = config.get("eos_token_id") if isinstance(config, Mapping) else None
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if type(i) is int and 0 <= i < 2**32]
