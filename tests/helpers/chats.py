"""Conversations in few words, and what of them is trained."""

from typing import Any

from helpers.chat_templates import FAMILIES, ChatFamily
from jaxmoe.chat.records import Conversation, Message, Piece
from jaxmoe.chat.turns import Sample, TrainedTurns, TrainOn

DEFAULT = TrainOn()
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"arg_city": {"type": "string", "description": "which"}},
        },
    },
}


def user(text: str) -> Message:
    return Message("user", (Piece(text),))


def system(text: str) -> Message:
    return Message("system", (Piece(text),))


def said(text: str, reasoning: str | None = None, *cities: str, weight: float | None = None) -> Message:
    """A turn of the assistant, with a call for each city."""
    calls = tuple(
        {
            "type": "function",
            "id": f"call_{n}",
            "function": {"name": "weather", "arguments": {"arg_city": city}},
        }
        for n, city in enumerate(cities)
    )
    return Message("assistant", (Piece(text),) if text else (), reasoning, calls, weight)


def result(text: str, number: int = 0) -> Message:
    return Message("tool", (Piece(text),), other={"name": "weather", "tool_call_id": f"call_{number}"})


def chat(*messages: Message, tools: bool = False, **arguments: Any) -> Conversation:
    return Conversation(messages, (SCHEMA,) if tools else None, arguments)


def samples(
    family: ChatFamily | str, conversation: Conversation, train_on: TrainOn = DEFAULT
) -> list[Sample]:
    family = FAMILIES[family] if isinstance(family, str) else family
    return TrainedTurns(family.template, family.ends, train_on).samples(conversation)


def trained(
    family: ChatFamily | str, conversation: Conversation, train_on: TrainOn = DEFAULT
) -> list[list[str]]:
    """The trained texts of each sample."""
    return [spelt(sample) for sample in samples(family, conversation, train_on)]


def spelt(sample: Sample) -> list[str]:
    """The trained texts of a sample."""
    return [sample.text[span.begin : span.end] for span in sample.spans]
