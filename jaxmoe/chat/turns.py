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
from typing import Any

from jaxmoe.chat.calls import as_python, missing_part
from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import ASSISTANT, Conversation, Message, Piece
from jaxmoe.chat.samples import Sample, Span, TrainOn, joined
from jaxmoe.chat.templates import DIALECTS, ChatTemplate, Dialect, TemplateFault
from jaxmoe.errors import UserError, quote

_PROBE = Message("user", (Piece("And then?"),))
_RESULT = Message("tool", (Piece("{}"),))
_PLACEHOLDER = "Gladly: 7 it is."
"""A text that no conversation has, and that templates write as it is."""
_INLINE = re.compile(r"^\s*<think>(.*?)</think>", re.DOTALL)
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A trained turn in the text of the conversation that ends with it.

    Attributes:
        number: of its message.
        text: with what ends it.
        begin: of what is trained, in characters.
        stop: where the token that ends it begins; the end of the text where there is none.
        spans: what is trained of it, without the end.
        weight: of the token that ends it.
    """

    number: int
    text: str
    begin: int
    stop: int
    spans: tuple[Span, ...]
    weight: float


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
        plain = (_PROBE, Message(ASSISTANT, (Piece(_PLACEHOLDER),)), _PROBE)
        try:
            text = self.template.render(plain)
        except TemplateFault:
            return None
        return self.ends.first(text.partition(_PLACEHOLDER)[2])

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
        self._options: dict[str, Any] = {
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
            self._check_history(text, turns)
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
        whole = self._render(number + 1, number)
        messages = self._messages[: number + 1]
        if messages[number].role != ASSISTANT:
            return self._other_turn(messages, number, whole, weight)
        begin = self._begin(number, whole)
        end, token = self._end(number, whole, begin)
        self._check_said(number, whole[begin:end])
        spans = self._spans(messages, number, whole, begin, end)
        return _Turn(number, whole[:end] + token, begin, end, spans, weight)

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
        begin = common
        # Not in a word or a mark that the generation prompt and the answer happen to begin with.
        while (
            begin > len(history)
            and not whole[begin - 1].isspace()
            and not self._ends.trailing(whole[len(history) : begin])
        ):
            begin -= 1
        self.notes[
            f"the generation prompt ends with {prompt[begin:]!r} and the turn that is trained has not: serve the model "
            "without it, or set chat_template_kwargs so that both are alike"
        ] += 1
        return begin

    def _end(self, number: int, whole: str, begin: int) -> tuple[int, str]:
        """Where what the turn says ends, and the token that ends it."""
        stops = self._ends.stops
        end, token = self._closing(whole, begin, len(whole)) or (len(whole), None)
        if token not in stops and (follows := self._following(number, whole)) in stops:
            end, token = len(whole), follows
        elif token is None:
            usual = self._owner.usual_end
            token = usual if usual in stops else follows or self._put_there(number)
        if token not in stops:
            self.notes[_not_a_stop(token)] += 1
        return end, token

    def _closing(self, text: str, begin: int, end: int) -> tuple[int, str] | None:
        """Where the token begins that ends the turn between two places, and the token; None if none is there."""
        trailing = [(begin + a, text[begin + a : begin + b]) for a, b in self._ends.trailing(text[begin:end])]
        stops = [found for found in trailing if found[1] in self._ends.stops]
        usual = [found for found in trailing if found[1] == self._owner.usual_end]
        return next(iter(stops or usual or trailing[-1:]), None)

    def _following(self, number: int, whole: str) -> str | None:
        """The token with which the next turn begins; None where it begins otherwise."""
        probe = _RESULT if self._messages[number].tool_calls else _PROBE
        after = self._messages[number + 1 : number + 2] or (probe,)
        try:
            longer = self._template.render((*self._messages[: number + 1], *after), **self._options)
        except TemplateFault:
            return None
        return self._ends.leading(longer[len(whole) :]) if longer.startswith(whole) else None

    def _put_there(self, number: int) -> str:
        """The token that ends a turn where the template ends turns with none."""
        if not self._ends.stops:
            raise self._refusal(
                number, "no token ends it and the tokenizer has no eos_token", "set train_on.end_tokens"
            )
        self.notes[f"the template ends turns with no token: {self._ends.stops[0]!r} was put there"] += 1
        return self._ends.stops[0]

    def _other_turn(self, messages: Sequence[Message], number: int, text: str, weight: float) -> _Turn:
        """A turn that nothing is generated of: its content, and the token that comes after it."""
        found = self._content(messages, number, text)
        if found is None or found[0] == found[1]:
            raise self._refusal(
                number, "its content is empty or the template changes it, and it is to be trained"
            )
        begin, end, _ = found
        token = self._ends.leading(text[end:].lstrip())
        stop = end if token is None else text.index(token, end)
        spans = self._spans(messages, number, text, begin, end)
        return _Turn(number, text[: stop + len(token or "")], begin, stop, spans, weight)

    # -- with marks

    def _by_marks(self, trained: Sequence[int], weights: Sequence[float]) -> list[tuple[str, list[_Turn]]]:
        try:
            text, marks = self._template.marked(self._messages, **self._options)
        except TemplateFault as fault:
            raise self._fault(len(self._messages) - 1, fault) from None
        marks = [(begin, end) for begin, end in marks if end > begin]
        written = [number for number, message in enumerate(self._messages) if message.role == ASSISTANT]
        if len(marks) != len(written):
            marks = list(_adjoined(marks))
        if len(marks) != len(written):
            raise self._refusal(
                trained[0],
                f"the template marks {len(marks)} turns as generated and the conversation has {len(written)} of the "
                "assistant",
            )
        places = dict(zip(written, marks, strict=True))
        turns = [
            self._marked_turn(number, text, *places[number], weights[number])
            if number in places
            else self._other_turn(self._messages, number, text, weights[number])
            for number in trained
        ]
        return [(max((turn.text for turn in turns), key=len), turns)]

    def _marked_turn(self, number: int, text: str, begin: int, end: int, weight: float) -> _Turn:
        self._check_said(number, text[begin:end])
        # Where the mark leaves out the token that ends the turn, it would never be learnt.
        stop, token = self._closing(text, begin, end) or (end, self._ends.leading(text[end:]))
        if token is None:
            self.notes["the template marks no token that ends turns: none is trained"] += 1
        elif token not in self._ends.stops:
            self.notes[_not_a_stop(token)] += 1
        spans = self._spans(self._messages, number, text, begin, stop)
        return _Turn(number, text[: stop + len(token or "")], begin, stop, spans, weight)

    # -- both

    def _changed(self, messages: Sequence[Message], number: int, other: Message) -> str:
        """The text of messages with another one in place of one; empty where the template does not take it."""
        try:
            return self._template.render(
                (*messages[:number], other, *messages[number + 1 :]), **self._options
            )
        except TemplateFault:
            return ""

    def _sample(self, text: str, turns: Sequence[_Turn], last: int) -> Sample:
        spans: list[Span] = []
        policy = self._train_on.end_of_turn
        for turn in turns:
            spans.extend(turn.spans)
            ends = len(turn.text) > turn.stop
            if ends and (policy in ("turn", "all") or (policy == "last" and turn.number == last)):
                spans.append(Span(turn.stop, len(turn.text), turn.weight))
        if policy == "all":
            spans.extend(self._other_ends(text, turns))
        prompts = [turn.begin for turn in turns if self._messages[turn.number].role == ASSISTANT]
        return Sample(text, tuple(joined(sorted(spans, key=lambda span: span.begin))), tuple(prompts))

    def _other_ends(self, text: str, turns: Sequence[_Turn]) -> Iterator[Span]:
        """The tokens that end turns which are not trained, where they are the ones that end trained turns."""
        trained = {turn.number for turn in turns}
        tokens = {turn.text[turn.stop :] for turn in turns}
        for number in range(turns[-1].number):
            if number in trained:
                continue
            try:
                whole = self._template.render(self._messages[: number + 1], **self._options)
            except TemplateFault:  # of a system turn alone, for one
                continue
            for begin, end in self._ends.trailing(whole):
                if whole[begin:end] in tokens and text.startswith(whole[:end]):
                    yield Span(begin, end, 1.0)

    def _spans(
        self, messages: Sequence[Message], number: int, text: str, begin: int, end: int
    ) -> tuple[Span, ...]:
        """What is trained between two places of the text of messages, which are around what one of them says."""
        message = messages[number]
        # Around the content, that is for thoughts and calls, the turn's own weight holds.
        own = message.weight if message.weight is not None else float(message.role in self._train_on.roles)
        if not self._train_on.reasoning:
            begin = self._after_reasoning(messages, number, text, begin)
        parts = [(begin, end, own)]
        if any(piece.weight is not None for piece in message.pieces):
            found = self._content(messages, number, text)
            if found is None:
                raise self._refusal(
                    number, "parts of its content have weights and the template changes the content"
                )
            first, last, place = found
            parts = [(begin, first, own)]
            for piece in message.pieces:
                weight = own if piece.weight is None else piece.weight
                parts.append((max(first, place), min(last, place + len(piece.text)), weight))
                place += len(piece.text)
            parts.append((last, end, own))
        return tuple(Span(max(a, begin), b, weight) for a, b, weight in parts if weight and b > max(a, begin))

    def _after_reasoning(self, messages: Sequence[Message], number: int, text: str, begin: int) -> int:
        """Where a turn goes on after what was thought."""
        message = messages[number]
        content = message.content
        if message.reasoning is not None:
            thought, other = message.reasoning, dataclasses.replace(message, reasoning=_PLACEHOLDER)
        elif inline := _INLINE.match(content):
            thought = inline[1]
            instead = content[: inline.start(1)] + _PLACEHOLDER + content[inline.end(1) :]
            other = dataclasses.replace(message, pieces=(Piece(instead),))
        else:
            return begin
        if not thought.strip():
            return begin
        found = self._place(messages, number, text, other, thought.rstrip())
        if found is not None:
            return max(begin, found[1])
        if _PLACEHOLDER in self._changed(messages, number, other):
            raise self._refusal(number, "its reasoning is not to be trained and the template changes it")
        return begin

    def _content(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int, int] | None:
        """`_place` of the content of a message."""
        message = messages[number]
        other = dataclasses.replace(message, pieces=(Piece(_PLACEHOLDER),))
        return self._place(messages, number, text, other, message.content)

    def _place(
        self, messages: Sequence[Message], number: int, text: str, other: Message, value: str
    ) -> tuple[int, int, int] | None:
        """Where what a message says is in the text of messages.

        Found by what becomes of ``other``, the same message with the placeholder for it, and not by looking for it: the
        same words may be elsewhere.

        Returns:
            Where it begins and ends, without white space that the template takes off, and where it would begin with
            that; None if the template changes it.
        """
        before, found, after = self._changed(messages, number, other).partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in after or not text.startswith(before):
            return None
        at = len(before)
        for kept in (value, value.rstrip(), value.lstrip(), value.strip()):
            if text.startswith(kept, at):
                return at, at + len(kept), at - value.index(kept)
        return None

    def _check_said(self, number: int, target: str) -> None:
        """Refuse unless all that the turn says is in what is trained."""
        message = self._messages[number]
        content = message.content.strip()
        if content and (message.tool_calls or message.reasoning):
            # Content of a few letters is in other things that the turn says as well.
            other = dataclasses.replace(message, pieces=(Piece(_PLACEHOLDER),))
            if _PLACEHOLDER not in self._changed(self._messages[: number + 1], number, other):
                raise self._refusal(number, "the template leaves its content out")
        if content not in target:
            answer = content.rpartition("</think>")[2].strip() if "</think>" in content else content
            if answer not in target and _spaceless(answer) not in _spaceless(target):
                raise self._refusal(
                    number, f"its content {quote(content[:60])} is not in the text that would be trained"
                )
            self.notes["thoughts inside the content are left out by the template"] += 1
        for call in message.tool_calls:
            if (written := as_python(call)) is not None and written in target:
                raise self._refusal(
                    number, f"its tool call's {quote(written[:60])} is written as Python does and not as JSON"
                )
        if (missing := missing_part(message.tool_calls, target)) is not None:
            raise self._refusal(
                number, f"{quote(missing[:60])} of its tool calls is not in the text that would be trained"
            )
        thought = (message.reasoning or "").strip()
        if thought and thought not in target:
            self.notes["the template leaves out reasoning of the turn that is trained"] += 1

    def _check_history(self, text: str, turns: Sequence[_Turn]) -> None:
        """Refuse where a template silently leaves out what others said, or the tools, or lets the assistant say it."""
        after = 0
        for turn in turns:
            generated = self._messages[turn.number].role == ASSISTANT
            before = text[: turn.begin] if generated else text
            for number in range(after, turn.number):
                if self._messages[number].role != ASSISTANT:
                    self._check_shown(number, turn.number, before)
            after = turn.number
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

    def _check_shown(self, number: int, turn: int, text: str) -> None:
        """Refuse unless the text before a turn has what another one says."""
        message = self._messages[number]
        content = message.content.strip()
        if content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
            return
        if _spaceless(content) in _spaceless(text):
            return
        if message.role == "tool":
            messages = self._messages[: turn + 1]
            other = dataclasses.replace(message, pieces=(Piece(_PLACEHOLDER),))
            if self._changed(messages, number, other) != self._changed(messages, number, message):
                self.notes["the template writes results of tools in a form of its own"] += 1
                return
        remedy = "use another template"
        if message.role == "system":
            remedy = "set the source's system: drop, or another template"
        raise self._refusal(number, f"the template leaves its content out before turn {turn + 1}", remedy)

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


def _adjoined(marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marks of which one ends where the next begins as one: some templates mark a turn in parts."""
    joined: list[tuple[int, int]] = []
    for begin, end in marks:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _not_a_stop(token: str) -> str:
    return f"turns end with {token!r}, at which generation does not stop: name it in generation_config's eos_token_id"


def _spaceless(text: str) -> str:
    return _SPACE.sub("", text)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[low:middle], low) else (low, middle - 1)
    return low
