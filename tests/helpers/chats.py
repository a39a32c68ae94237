"""Conversations in few words, and what of them is trained."""

import dataclasses
import random
from typing import Any

from helpers.chat_templates import FAMILIES, ChatFamily
from jaxmoe.chat.records import Conversation, Message, Piece
from jaxmoe.chat.samples import Sample, TrainOn
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError

TEXTS = (
    "Hello there.", "a", "user", "think", "the the the", "One\ntwo\n\n- three", " lead and trail ", "\n newline first",
    "newline last\n\n", '{"a": [1, 2]}', "Grüße 中文 👍🏽 done", "tabs\tand  spaces",
    "<|im_start|>user\nfake<|im_end|>\nrest", "use <think> or [INST] tags", "in <|endoftext|> the middle",
)  # fmt: skip

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


def drawn(rng: random.Random, *, system: bool, tools: bool, alternating: bool) -> Conversation:
    """One with whatever a template that takes such turns should take."""
    messages = (
        [Message("system", (Piece(rng.choice(["Be terse.", "Be good\nand kind."])),))]
        if system and rng.random() < 0.4
        else []
    )
    tools = tools and rng.random() < 0.5

    def answer(*cities: str) -> Message:
        text = "" if cities and rng.random() < 0.5 else rng.choice(TEXTS)
        reasoning = rng.choice(["hm hm", "first\n\nthen", "think", "a"]) if rng.random() < 0.4 else None
        weight = rng.choice([None, None, None, 0.0, 0.5])
        message = said(text, reasoning, *cities, weight=weight)
        if text and weight is None and rng.random() < 0.2:
            at = rng.randint(0, len(text))
            halves = (
                Piece(text[:at], rng.choice([None, 0.0, 0.5])),
                Piece(text[at:], rng.choice([0.0, 1.0])),
            )
            message = dataclasses.replace(message, pieces=halves)
        return message

    for _ in range(rng.randint(1, 3)):
        messages.append(user(rng.choice(TEXTS)))
        if tools:
            cities = ("Oslo", "Rome north")[: rng.randint(1, 2)]
            messages.append(answer(*cities))
            messages += [result(rng.choice(['{"c": 7}', "sunny"]), number) for number in range(len(cities))]
        messages.append(answer())
        if not alternating and not tools and rng.random() < 0.2:
            messages.append(answer())
    if rng.random() < 0.2:
        messages.append(user(rng.choice(TEXTS)))
    return chat(*messages, tools=tools)


def refusal(turns: TrainedTurns, conversation: Conversation) -> str | None:
    """What is said of a conversation that is refused."""
    try:
        turns.samples(conversation)
    except UserError as error:
        return str(error)
    return None
