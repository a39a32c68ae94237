"""What of a conversation is trained, decided on its rendered text and checked there.

A turn of the assistant is what the model must write after what it would be served: the text that the template gives
for the turns before it, with the generation prompt. So for turn i the template is rendered twice, up to it with that
prompt (P) and up to its end (F); where F begins with P, the rest is what is trained. Turns share a sample if the text
of the longer conversation begins with that of the shorter one, which many templates spoil by taking thoughts out of
earlier turns; the others have samples of their own. Templates with ``{% generation %}`` say themselves what the model
writes. Whatever is found, what the turn says must be in it: a mask that is not known to be right is refused.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jaxmoe.chat.records import ASSISTANT, Conversation, Message, Piece
from jaxmoe.chat.templates import DIALECTS, ChatTemplate, Dialect, TemplateFault
from jaxmoe.errors import UserError, quote

_PROBE = Message("user", (Piece("And then?"),))
_RESULT = Message("tool", (Piece("{}"),))
_INLINE = re.compile(r"^\s*<think>(.*?)</think>", re.DOTALL)
_SPACE = re.compile(r"\s+")


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
    """A text and what of it is trained, the spans in order and apart."""

    text: str
    spans: tuple[Span, ...]


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

    def before(self, text: str, at: int) -> int:
        """A place not inside one of them: ``at``, or where the one begins that it is in."""
        return next((m.start() for m in self._any.finditer(text) if m.start() < at < m.end()), at)


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A trained turn in the text of the conversation that ends with it.

    Attributes:
        number: of its message.
        text: with what ends it.
        begin: of what is trained, in characters.
        stop: where the token that ends it begins; the end of the text where there is none.
        spans: what is trained of it, without the end.
    """

    number: int
    text: str
    begin: int
    stop: int
    spans: tuple[Span, ...]

    @property
    def weight(self) -> float:
        return self.spans[-1].weight if self.spans else 1.0


class TrainedTurns:
    """Finds what of conversations is trained.

    Args:
        template: that renders them.
        ends: the tokens that end turns.
        train_on: which turns are trained.
    """

    def __init__(self, template: ChatTemplate, ends: EndTokens, train_on: TrainOn = TrainOn()):
        self.template = template
        self.ends = ends
        self.train_on = train_on
        self.notes: collections.Counter[str] = collections.Counter()
        """What is not as one would expect, and in how many turns or rows."""

    @functools.cached_property
    def usual_end(self) -> str | None:
        """The token that ends a plain answer in the middle of a conversation; None where it cannot be seen."""
        answer = "Gladly indeed."
        plain = (_PROBE, Message(ASSISTANT, (Piece(answer),)), _PROBE)
        try:
            text = self.template.render(plain)
        except TemplateFault:
            return None
        return self.ends.first(text.partition(answer)[2])

    def samples(self, conversation: Conversation) -> list[Sample]:
        """The texts to train on, in the order of the turns that they end with.

        Raises:
            UserError: the template does not take the conversation, or what is trained of it is not known for sure; the
                turn is named.
        """
        weights = self._weights(conversation)
        trained = [number for number, weight in enumerate(weights) if weight]
        if not trained:
            roles = sorted({message.role for message in conversation.messages})
            raise UserError(
                f"no turn to train on among roles {', '.join(roles)}, expected one of "
                f"{', '.join(self.train_on.roles)}: set train_on.roles or rename roles"
            )
        problem: UserError | None = None
        for dialect in DIALECTS if any(m.tool_calls for m in conversation.messages) else DIALECTS[:1]:
            attempt = _Attempt(self, conversation, dialect)
            try:
                samples = attempt.samples(trained, weights)
            except UserError as error:
                problem = problem or error
                continue
            self.notes.update(attempt.notes)
            return samples
        assert problem is not None
        raise problem

    def _weights(self, conversation: Conversation) -> list[float]:
        """Of each message: 0 where none of it is trained."""
        weights = [self._weight(message) for message in conversation.messages]
        if self.train_on.last_turn_only:
            last = max((number for number, weight in enumerate(weights) if weight), default=-1)
            weights = [weight if number == last else 0.0 for number, weight in enumerate(weights)]
        return weights

    def _weight(self, message: Message) -> float:
        if message.weight is not None:
            return message.weight
        given = [piece.weight for piece in message.pieces if piece.weight is not None]
        by_role = float(message.role in self.train_on.roles)
        return by_role or max(given, default=0.0)


class _Attempt:
    """One conversation in one dialect."""

    def __init__(self, owner: TrainedTurns, conversation: Conversation, dialect: Dialect):
        self._owner = owner
        self._template, self._ends, self._train_on = owner.template, owner.ends, owner.train_on
        self._messages = conversation.messages
        self._options = {
            "tools": conversation.tools,
            "arguments": conversation.template_arguments,
            "dialect": dialect,
        }
        self._tools = conversation.tools
        self.notes: collections.Counter[str] = collections.Counter()

    def samples(self, trained: Sequence[int], weights: Sequence[float]) -> list[Sample]:
        """Texts and spans; see `TrainedTurns.samples`."""
        found = (
            self._by_marks(trained, weights) if self._template.marks else self._by_rendering(trained, weights)
        )
        for text, turns in found:
            self._check_history(text, turns[-1].number)
        last = max(turn.number for _, turns in found for turn in turns)
        return [self._sample(text, turns, last) for text, turns in found]

    # -- without marks

    def _by_rendering(
        self, trained: Sequence[int], weights: Sequence[float]
    ) -> list[tuple[str, list[_Turn]]]:
        """Texts with the turns that are trained in each: as few as there can be."""
        left = [self._turn(number, weights[number]) for number in trained]
        found = []
        while left:
            text = left[-1].text
            together = [turn for turn in left if text.startswith(turn.text)]
            left = [turn for turn in left if not text.startswith(turn.text)]
            found.append((text, together))
        if len(found) > 1:
            self.notes["split: the template rewrites earlier turns, so turns have samples of their own"] += 1
        return found[::-1]

    def _turn(self, number: int, weight: float) -> _Turn:
        message = self._messages[number]
        whole = self._render(number + 1, number)
        if message.role != ASSISTANT:
            return self._other_turn(number, weight, whole)
        begin = self._begin(number, whole)
        end, stop = self._end(number, whole, begin)
        said = whole[:end] if end < len(whole) else whole
        self._check_said(number, said[begin:])
        return _Turn(number, said + stop, begin, len(said), self._spans(number, said, begin, weight))

    def _begin(self, number: int, whole: str) -> int:
        """Where what the model writes begins in the text that ends with its turn."""
        prompt = self._render(number, number, generation_prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        history = self._render(number, number).rstrip()
        common = _common(prompt, whole)
        if not prompt.startswith(history) or common < len(history):
            raise self._refusal(
                number,
                "the template writes the turns before it differently once it is there, so that no prompt fits",
            )
        begin = min(self._ends.before(prompt, common), self._ends.before(whole, common))
        # Not in a word that the generation prompt and the answer happen to begin with.
        while (
            begin > len(history) and not whole[begin - 1].isspace() and not self._ends.trailing(whole[:begin])
        ):
            begin -= 1
        self.notes[
            f"the generation prompt ends with {prompt[begin:]!r} and the turn that is trained has not: serve the model "
            "without it, or set chat_template_kwargs so that both are alike"
        ] += 1
        return begin

    def _end(self, number: int, whole: str, begin: int) -> tuple[int, str]:
        """Where what the turn says ends, and the token that ends it."""
        trailing = [
            (begin + first, whole[begin + first : begin + last])
            for first, last in self._ends.trailing(whole[begin:])
        ]
        if trailing:
            stops = [end for end in trailing if end[1] in self._ends.stops]
            usual = [end for end in trailing if end[1] == self._owner.usual_end]
            at, token = (stops or usual or trailing[-1:])[0]
            if not stops:
                self.notes[_not_a_stop(token)] += 1
            return at, token
        token = self._end_that_follows(number, whole)
        if token is None:
            raise self._refusal(
                number, "no token ends it and the tokenizer has no eos_token", "set train_on.end_tokens"
            )
        if token not in self._ends.stops:
            self.notes[_not_a_stop(token)] += 1
        return len(whole), token

    def _end_that_follows(self, number: int, whole: str) -> str | None:
        """The token with which the next turn begins, where the template puts none after an answer."""
        message = self._messages[number]
        probe = _RESULT if message.tool_calls else _PROBE
        after = self._messages[number + 1 : number + 2] or (probe,)
        try:
            longer = self._template.render((*self._messages[: number + 1], *after), **self._options)
        except TemplateFault:
            longer = ""
        if longer.startswith(whole) and (token := self._ends.leading(longer[len(whole) :])):
            return token
        if self._owner.usual_end in self._ends.stops:
            return self._owner.usual_end
        if self._ends.stops:
            self.notes[f"the template ends turns with no token: {self._ends.stops[0]!r} was put there"] += 1
            return self._ends.stops[0]
        return None

    def _other_turn(self, number: int, weight: float, whole: str) -> _Turn:
        """A turn that nothing is generated of: its content, found where the text of the turn is."""
        content = self._messages[number].content.strip()
        try:
            before = self._template.render(self._messages[:number], **self._options)
        except TemplateFault:
            before = ""
        least = _common(before, whole)
        places = [m.start() for m in re.finditer(re.escape(content), whole) if m.start() >= least]
        if not content or len(places) != 1:
            raise self._refusal(
                number, f"its content is found {len(places)} times in the text that the template makes of it"
            )
        end = places[0] + len(content)
        token = self._ends.leading(whole[end:].lstrip())
        if token is None:
            return _Turn(number, whole[:end], places[0], end, (Span(places[0], end, weight),))
        stop = whole.index(token, end)
        return _Turn(number, whole[: stop + len(token)], places[0], stop, (Span(places[0], end, weight),))

    # -- with marks

    def _by_marks(self, trained: Sequence[int], weights: Sequence[float]) -> list[tuple[str, list[_Turn]]]:
        try:
            text, marks = self._template.marked(self._messages, **self._options)
        except TemplateFault as fault:
            raise self._fault(len(self._messages) - 1, fault) from None
        marks = [(begin, end) for begin, end in marks if end > begin]
        written = [number for number, message in enumerate(self._messages) if message.role == ASSISTANT]
        if len(marks) != len(written) or any(self._messages[number].role != ASSISTANT for number in trained):
            raise self._refusal(
                trained[0],
                f"the template marks {len(marks)} turns as generated and the conversation has {len(written)} of the "
                "assistant",
            )
        turns = []
        for number, (begin, end) in zip(written, marks, strict=True):
            if number not in trained:
                continue
            self._check_said(number, text[begin:end])
            trailing = self._ends.trailing(text[begin:end])
            if trailing:
                stop, end = begin + trailing[0][0], begin + trailing[-1][1]
            else:
                stop, token = end, self._ends.leading(text[end:])
                end += len(token or "")
            turns.append(
                _Turn(
                    number, text[:end], begin, stop, self._spans(number, text[:stop], begin, weights[number])
                )
            )
        return [(turns[-1].text, turns)]

    # -- both

    def _sample(self, text: str, turns: Sequence[_Turn], last: int) -> Sample:
        spans: list[Span] = []
        policy = self._train_on.end_of_turn
        for turn in turns:
            spans.extend(turn.spans)
            ends = len(turn.text) > turn.stop
            if ends and (policy in ("turn", "all") or (policy == "last" and turn.number == last)):
                spans.append(Span(turn.stop, len(turn.text), turn.weight))
        if policy == "all":
            tokens = {turn.text[turn.stop :] for turn in turns} - {""}
            inside = [(turn.begin, len(turn.text)) for turn in turns]
            for token in tokens:
                for match in re.finditer(re.escape(token), text):
                    if not any(begin <= match.start() < end for begin, end in inside):
                        spans.append(Span(*match.span(), 1.0))
        return Sample(text, tuple(_joined(sorted(spans, key=lambda span: span.begin))))

    def _spans(self, number: int, said: str, begin: int, weight: float) -> tuple[Span, ...]:
        """What is trained from ``begin`` to the end of ``said``."""
        message = self._messages[number]
        if not self._train_on.reasoning:
            begin = self._after_reasoning(message, said, begin)
        if all(piece.weight is None for piece in message.pieces):
            return (Span(begin, len(said), weight),) if begin < len(said) else ()
        content = message.content
        at = said.rfind(content, begin)
        if at < 0:
            raise self._refusal(
                number, "parts of its content have weights and the template changes the content"
            )
        # Around the content, that is for thoughts and calls, the turn's own weight holds.
        own = message.weight if message.weight is not None else float(message.role in self._train_on.roles)
        spans, place = [Span(begin, at, own)], at
        for piece in message.pieces:
            each = own if piece.weight is None else piece.weight
            spans.append(Span(place, place + len(piece.text), each))
            place += len(piece.text)
        spans.append(Span(place, len(said), own))
        return tuple(span for span in spans if span.weight and span.end > span.begin)

    def _after_reasoning(self, message: Message, said: str, begin: int) -> int:
        thought = message.reasoning
        if thought is None and (inline := _INLINE.match(message.content)):
            thought = inline[1]
        if thought is None or not thought.strip():
            return begin
        at = said.find(thought.strip(), begin)
        return begin if at < 0 else at + len(thought.strip())

    def _check_said(self, number: int, target: str) -> None:
        """Refuse unless all that the turn says is in what is trained."""
        message = self._messages[number]
        content = message.content.strip()
        if content not in target:
            answer = content.rpartition("</think>")[2].strip() if "</think>" in content else content
            if answer not in target and _spaceless(answer) not in _spaceless(target):
                raise self._refusal(
                    number, f"its content {quote(content[:60])} is not in the text that would be trained"
                )
            self.notes["thoughts inside the content are left out by the template"] += 1
        for call in message.tool_calls:
            missing = [part for part in _parts(call) if part not in target]
            if missing:
                raise self._refusal(
                    number, f"its tool call's {quote(missing[0])} is not in the text that would be trained"
                )
        thought = (message.reasoning or "").strip()
        if thought and thought not in target:
            self.notes["the template leaves out reasoning of the turn that is trained"] += 1

    def _check_history(self, text: str, last: int) -> None:
        """Refuse where the template silently leaves out what others said, or the tools."""
        for number, message in enumerate(self._messages[:last]):
            content = message.content.strip()
            if message.role == ASSISTANT or not content or content in text:
                continue
            if json.dumps(content, ensure_ascii=False)[1:-1] in text or _spaceless(content) in _spaceless(
                text
            ):
                continue
            if message.role == "tool":
                self.notes["the template writes results of tools in a form of its own"] += 1
                continue
            remedy = (
                "set the source's system: drop, or another template"
                if message.role == "system"
                else "use another template"
            )
            raise self._refusal(number, "the template leaves its content out", remedy)
        for tool in self._tools or ():
            name = (
                tool.get("function", tool).get("name")
                if isinstance(tool.get("function", tool), Mapping)
                else None
            )
            if isinstance(name, str) and name not in text:
                raise UserError(
                    f"{self._template.origin} leaves the tool {name!r} out, expected one that shows tools: use another "
                    "template, or set the source's tools: drop"
                )

    def _render(self, count: int, number: int, generation_prompt: bool = False) -> str:
        if not count and not generation_prompt:
            return ""
        try:
            return self._template.render(
                self._messages[:count], generation_prompt=generation_prompt, **self._options
            )
        except TemplateFault as fault:
            raise self._fault(number, fault) from None

    def _fault(self, number: int, fault: TemplateFault) -> UserError:
        return self._refusal(
            number, f"the template refuses it ({fault})", "mend the conversation or use another template"
        )

    def _refusal(
        self, number: int, reason: str, remedy: str = "use another template, or leave the row out"
    ) -> UserError:
        role = self._messages[number].role
        return UserError(f"turn {number + 1} ({role}): {reason}: {remedy} ({self._template.origin})")


def _parts(call: Mapping[str, object]) -> Iterator[str]:
    """What must be read in the text of a call: its name and its arguments' names."""
    function = call["function"]
    assert isinstance(function, Mapping)
    yield str(function["name"])
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        yield from map(str, arguments)


def _joined(spans: Sequence[Span]) -> Iterator[Span]:
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


def _not_a_stop(token: str) -> str:
    return f"turns end with {token!r}, at which generation does not stop: name it in generation_config's eos_token_id"


def _spaceless(text: str) -> str:
    return _SPACE.sub("", text)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(at for at in range(most) if one[at] != other[at])
