"""Examples shown token by token: what is trained, and what only read."""

import html
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from jaxmoe.chat.encoder import Example

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {True: ("bold green", "bold bright_green"), False: ("bright_black", "white")}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; border-radius: 6px; padding: .8em }}
b {{ font-weight: normal; background: #d7f0d7; outline: 1px solid #9fd09f }} i {{ font-style: normal; color: #666 }}
b.part {{ background: #fff2c4; outline-color: #e0c464 }} table {{ border-collapse: collapse }}
td {{ padding: .1em 1em .1em 0; vertical-align: top }}
</style><h1>{title}</h1><p><b>trained</b> <b class="part">trained with a weight other than 1</b> <i>read only</i>; a
token's id and weight show under the pointer.</p>
"""


def pieces(tokenizer: Tokenizer, example: Example) -> Iterator[tuple[str, list[int], float]]:
    """Texts of tokens with their ids and weight: one each, or several where a character has more than one token."""
    stream = DecodeStream(skip_special_tokens=False)
    waiting: list[int] = []
    largest = 0.0
    for token, weight in zip(example.ids.tolist(), example.weights.tolist(), strict=True):
        waiting.append(token)
        largest = max(largest, weight)
        text = stream.step(tokenizer, token)
        if text is not None:
            yield text, waiting, largest
            waiting, largest = [], 0.0
    if waiting:
        yield "\ufffd", waiting, largest


def coloured(tokenizer: Tokenizer, example: Example) -> "Text":
    """For a terminal: trained tokens in green, neighbours in two shades, line ends shown."""
    from rich.text import Text

    shown = Text()
    for number, (text, _, weight) in enumerate(pieces(tokenizer, example)):
        shown.append(text.replace("\n", "\u21b5\n"), _STYLES[weight > 0][number % 2])
    return shown


def page(
    title: str, figures: Iterable[tuple[str, str]], shown: Iterable[tuple[str, Tokenizer, Example]]
) -> Iterator[str]:
    """The parts of an HTML page: a table of figures, and examples below their places."""
    yield _PAGE.format(title=html.escape(title))
    yield "<table>"
    for name, value in figures:
        yield f"<tr><td>{html.escape(name)}<td>{html.escape(value)}"
    yield "</table>\n"
    for where, tokenizer, example in shown:
        yield f"<h2>{html.escape(where)}</h2><pre>"
        for text, ids, weight in pieces(tokenizer, example):
            tag = "b" if weight else "i"
            kind = ' class="part"' if weight not in (0.0, 1.0) else ""
            told = f"{' '.join(map(str, ids))}, weight {weight:g}"
            yield f'<{tag}{kind} title="{told}">{html.escape(text)}</{tag}>'
        yield "</pre>\n"


def json_line(tokenizer: Tokenizer, example: Example, where: str) -> str:
    """One example: ``where``, ``ids``, ``trained`` flags, ``weights`` and ``text``."""
    return json.dumps(
        {
            "where": where,
            "ids": example.ids.tolist(),
            "trained": (example.weights > 0).tolist(),
            "weights": example.weights.tolist(),
            "text": tokenizer.decode(example.ids.tolist(), skip_special_tokens=False),
        },
        ensure_ascii=False,
    )
