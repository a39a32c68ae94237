"""What a row of a dataset means, whatever columns it had."""

import dataclasses
from collections.abc import Mapping
from typing import Any

ASSISTANT = "assistant"
"""The role whose turns the model writes."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text and how much each of its tokens counts in the loss: 0 not at all; None as its message does."""

    text: str
    weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: as templates know it: system, user, assistant, tool or one of their own.
        pieces: of the content, which is their texts one after the other. Empty for an empty or missing content.
        reasoning: what was thought before it; None where nothing is said of that.
        tool_calls: as OpenAI's API has them, arguments as a mapping.
        weight: of its tokens in the loss; None leaves it to the role.
        other: further fields that a template may read (name, tool_call_id, ...), none of them None.
    """

    role: str
    pieces: tuple[Piece, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    weight: float | None = None
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def content(self) -> str:
        """The text of the turn."""
        return "".join(piece.text for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns that a chat template makes one text of.

    Attributes:
        messages: at least one.
        tools: JSON schemas of functions, or None where the row has none.
        template_arguments: what the template is given besides, such as enable_thinking.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Text without a template, piece by piece; every piece has a weight."""

    pieces: tuple[Piece, ...]
    ends: bool = True  # whether the token that ends a document follows


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What was tokenized before.

    Attributes:
        ids: (n,), 0 or more.
        weights: (n,), of each id as a target.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]


Record = Conversation | Segments | Tokens
