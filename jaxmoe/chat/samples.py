"""What of a text is trained, and what may be asked of that."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxmoe.chat.records import ASSISTANT


@dataclasses.dataclass(frozen=True)
class TrainOn:
    """Which tokens of a conversation count in the loss.

    Attributes:
        roles: whose turns, unless a message has a weight of its own.
        last_turn_only: of those, only the last.
        end_of_turn: the token that ends a turn: of the turns that are trained, of all turns, of the last one that is
            trained, or none.
        reasoning: whether what was thought is trained, with the mark that opens it.
    """

    roles: tuple[str, ...] = (ASSISTANT,)
    last_turn_only: bool = False
    end_of_turn: Literal["turn", "all", "last", "none"] = "turn"
    reasoning: bool = True


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters of a text that are trained.

    Attributes:
        begin: of the first.
        end: after the last.
        weight: of its tokens in the loss.
    """

    begin: int
    end: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text and what of it is trained.

    Attributes:
        text: with all that the model is given.
        spans: what is trained, in order and apart.
        prompts: where what the model is served ends and a trained turn goes on, in characters.
    """

    text: str
    spans: tuple[Span, ...]
    prompts: tuple[int, ...]


def joined(spans: Sequence[Span]) -> Iterator[Span]:
    """Spans that follow each other with the same weight as one."""
    last: Span | None = None
    for span in spans:
        if last is not None and span.begin <= last.end and span.weight == last.weight:
            last = Span(last.begin, max(last.end, span.end), last.weight)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last
