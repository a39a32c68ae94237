"""Who said each character of a rendered conversation, and whether the right ones are trained.

`coded` writes every letter of a conversation in letters that no other field has, out of Unicode's private use. So the
text that a template makes of it says of each letter whose it is, and what is trained can be judged without finding
anything by its wording. Every other character stays, and so do places in the text: the spans of the coded conversation
must be those of the plain one.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxmoe.chat.records import ASSISTANT, Conversation, Piece
from jaxmoe.chat.samples import Sample, TrainOn
from jaxmoe.chat.templates import DIALECTS, ChatTemplate, TemplateFault

_FIRST, _SIZE = 0xF0000, 128
_LITERAL = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]|\\[a-z]")
"""Left as it is: what templates look for, and escapes."""

TOOLS_FIELD = -1
"""The message number of what the tools' descriptions say."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A text of a conversation.

    Attributes:
        message: its number, or `TOOLS_FIELD`.
        kind: content, reasoning or call.
        text: in its own letters.
        weights: of its characters, as they are meant to count; 0 for those that are not trained.
    """

    message: int
    kind: str
    text: str
    weights: tuple[float, ...]


def coded(conversation: Conversation, train_on: TrainOn) -> tuple[Conversation, list[Field]]:
    """The conversation in letters of which each has one owner, and its texts."""
    fields: list[Field] = []

    def code(message: int, kind: str, text: str, weights: Sequence[float]) -> str:
        base, at, out = _FIRST + _SIZE * len(fields), 0, []
        for literal in [*_LITERAL.finditer(text), None]:
            end = len(text) if literal is None else literal.start()
            out += [chr(base + ord(c)) if c.isascii() and c.isalpha() else c for c in text[at:end]]
            if literal is not None:
                out.append(literal[0])
                at = literal.end()
        fields.append(Field(message, kind, "".join(out), tuple(weights)))
        return "".join(out)

    messages = []
    meant = _meant(conversation, train_on)
    for number, message in enumerate(conversation.messages):
        own = meant[number]
        content = [
            weight
            for piece in message.pieces
            for weight in [_of(piece, own) if own is not None else 0.0] * len(piece.text)
        ]
        text = code(number, "content", message.content, content)
        pieces, at = [], 0
        for piece in message.pieces:
            pieces.append(Piece(text[at : at + len(piece.text)], piece.weight))
            at += len(piece.text)
        thought = message.reasoning
        if thought is not None:
            weight = (own or 0.0) * train_on.reasoning
            thought = code(number, "reasoning", thought, [weight] * len(thought))
        calls = tuple(
            _recoded(call, lambda text, n=number, w=own: code(n, "call", text, [w or 0.0] * len(text)))
            for call in message.tool_calls
        )
        messages.append(
            dataclasses.replace(message, pieces=tuple(pieces), reasoning=thought, tool_calls=calls)
        )
    tools = conversation.tools
    if tools is not None:
        tools = tuple(
            _recoded(tool, lambda text: code(TOOLS_FIELD, "tool", text, [0.0] * len(text))) for tool in tools
        )
    return dataclasses.replace(conversation, messages=tuple(messages), tools=tools), fields


def _meant(conversation: Conversation, train_on: TrainOn) -> list[float | None]:
    """Each message's weight around its pieces; None where nothing of it is trained."""
    meant: list[float | None] = []
    for message in conversation.messages:
        by_role = float(message.role in train_on.roles)
        own = by_role if message.weight is None else message.weight
        by_piece = message.weight is None and any(piece.weight for piece in message.pieces)
        meant.append(own if own or by_piece else None)
    if train_on.last_turn_only:
        last = max((n for n, own in enumerate(meant) if own is not None), default=-1)
        meant = [own if number == last else None for number, own in enumerate(meant)]
    return meant


def _of(piece: Piece, own: float) -> float:
    return own if piece.weight is None else piece.weight


def _recoded(value: Any, code: Callable[[str], str]) -> Any:
    """A call or a schema with its free texts coded: values of arguments and descriptions."""
    if isinstance(value, Mapping):
        return {
            key: code(entry)
            if key == "description" or (isinstance(entry, str) and key.startswith("arg_"))
            else _recoded(entry, code)
            for key, entry in value.items()
        }
    return [_recoded(entry, code) for entry in value] if isinstance(value, list) else value


def owners(text: str, fields: Sequence[Field]) -> list[tuple[int, int] | None]:
    """Of each character the (field, place in it) that it is, None for what the template wrote.

    What is no letter belongs to the field that has the same between the same letters.
    """
    found: list[tuple[int, int] | None] = [None] * len(text)
    for number, field in enumerate(fields):
        base = _FIRST + _SIZE * number
        own = [at for at, c in enumerate(field.text) if base <= ord(c) < base + _SIZE]
        if not own:
            continue
        for start in (m.start() for m in re.finditer(re.escape(field.text[own[0]]), text)):
            if found[start] is not None:
                continue
            here, place = start, own[0]
            found[here] = (number, place)
            for at in range(here - 1, -1, -1):  # what comes before the first letter
                place -= 1
                if place < 0 or text[at] != field.text[place] or found[at] is not None:
                    break
                found[at] = (number, place)
            here, place = start + 1, own[0] + 1
            while here < len(text) and place < len(field.text) and text[here] == field.text[place]:
                found[here] = (number, place)
                here, place = here + 1, place + 1
    for at, c in enumerate(text):
        if found[at] is None and ord(c) >= _FIRST:
            # Torn from what came before it, by an escape for one: its letter still tells.
            number = (ord(c) - _FIRST) // _SIZE
            if number < len(fields) and c in fields[number].text:
                found[at] = (number, fields[number].text.index(c))
    return found


def faults(
    template: ChatTemplate,
    stops: Sequence[str],
    conversation: Conversation,
    fields: Sequence[Field],
    train_on: TrainOn,
    samples: Sequence[Sample],
    notes: Mapping[str, int],
) -> Iterator[str]:
    """What is wrong with samples of a coded conversation."""
    said = " ".join(notes)
    trained: dict[int, set[int]] = {}  # samples that train a field
    for index, sample in enumerate(samples):
        weights = [0.0] * len(sample.text)
        for span in sample.spans:
            if not 0 <= span.begin < span.end <= len(sample.text) or not span.weight:
                yield f"sample {index}: {span} of {len(sample.text)} characters"
            for at in range(span.begin, span.end):
                if weights[at]:
                    yield f"sample {index}: character {at} is in two spans"
                weights[at] = span.weight
        of = owners(sample.text, fields)
        seen: dict[int, list[tuple[int, float]]] = {}
        for at, owner in enumerate(of):
            if owner is not None:
                seen.setdefault(owner[0], []).append((owner[1], weights[at]))
        for number, places in seen.items():
            field = fields[number]
            counted = [(place, weight) for place, weight in places if weight]
            for place, weight in counted:
                if weight != field.weights[place] and not _letterless_border(field, place):
                    yield (
                        f"sample {index}: {field.text[place]!r} of turn {field.message + 1}'s {field.kind} has weight "
                        f"{weight}, meant {field.weights[place]}"
                    )
                    break
            if any(ord(field.text[place]) >= _FIRST for place, _ in counted):
                trained.setdefault(number, set()).add(index)
                letters = {place for place, _ in counted}
                missing = [
                    place
                    for place, weight in enumerate(field.weights)
                    if weight and ord(field.text[place]) >= _FIRST and place not in letters
                ]
                if missing and "left out by the template" not in said:
                    whose = f"turn {field.message + 1}'s {field.kind}"
                    yield f"sample {index}: {len(missing)} letters of {whose} are not trained"
    for number, field in enumerate(fields):
        if not any(w and ord(c) >= _FIRST for w, c in zip(field.weights, field.text, strict=True)):
            continue
        count = len(trained.get(number, ()))
        left_out = "leaves out reasoning" in said if field.kind == "reasoning" else "left out by" in said
        escaped = json.dumps(field.text)[1:-1]
        if count != 1 and not (count == 0 and (left_out or any(escaped in s.text for s in samples))):
            yield f"turn {field.message + 1}'s {field.kind} is trained in {count} samples"
    alone = train_on.roles == (ASSISTANT,)  # else turns of others may be joined with what is judged below
    if alone and train_on.end_of_turn == "turn" and train_on.reasoning and not template.marks:
        for number, own in enumerate(_meant(conversation, train_on)):
            message = conversation.messages[number]
            whole_weight = all(piece.weight is None for piece in message.pieces)
            if own and message.role == ASSISTANT and whole_weight:
                yield from _turn_faults(template, stops, conversation, number, own, samples, said)


def _letterless_border(field: Field, place: int) -> bool:
    """Whether a character is white space, of which templates take some and write some."""
    return field.text[place].isspace()


def _turn_faults(
    template: ChatTemplate,
    stops: Sequence[str],
    conversation: Conversation,
    number: int,
    weight: float,
    samples: Sequence[Sample],
    said: str,
) -> Iterator[str]:
    """What is wrong with a turn of the assistant against what the server would give and get."""
    pairs = []
    for dialect in DIALECTS:
        options: dict[str, Any] = {
            "tools": conversation.tools,
            "arguments": conversation.template_arguments,
            "dialect": dialect,
        }
        try:
            prompt = template.render(conversation.messages[:number], generation_prompt=True, **options)
            pairs.append((prompt, template.render(conversation.messages[: number + 1], **options)))
        except TemplateFault:
            continue
    name = f"turn {number + 1}"
    for prompt, whole in pairs:
        if not whole.startswith(prompt):
            if "generation prompt ends with" not in said:
                yield f"{name}: no note says that the prompt is not what it goes on from"
            return
        found = []
        for sample in samples:
            if not sample.text.startswith(prompt):
                continue
            at = len(prompt)
            span = next((s for s in sample.spans if s.begin <= at < s.end), None)
            # Of the turn before, where the template ends it with nothing.
            ends_here = bool(conversation.messages[number].content) and sample.text[at:] in stops
            if span is not None and not ends_here:
                found.append((sample, span, at))
        if not found:
            continue
        if len(found) != 1:
            yield f"{name}: trained after its prompt in {len(found)} samples"
        sample, span, at = found[0]
        if span.weight != weight:
            yield f"{name}: weight {span.weight}, meant {weight}"
        joined = any(sample.text[:at].endswith(stop) for stop in stops)
        if span.begin != at and not joined:  # with the turn before
            yield f"{name}: trained from {span.begin}, its prompt ends at {at}: {sample.text[span.begin : at]!r}"
        got, rest = sample.text[at : span.end], whole[at:]
        ended = [stop for stop in stops if got.endswith(stop)]
        if not ended:
            if "at which generation does not stop" not in said:
                yield f"{name}: ends with {got[-20:]!r} and no stop"
            return
        put_there = rest.rstrip() == got.removesuffix(ended[0]).rstrip()
        next_joined = got.startswith(rest)
        if not (rest.startswith(got) or put_there or next_joined):
            yield f"{name}: {got[-60:]!r} is trained, the template has {rest[-60:]!r}"
        return
    if pairs:
        yield f"{name}: not trained right after its prompt in any sample"
