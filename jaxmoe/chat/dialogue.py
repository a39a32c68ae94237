"""Conversations that a model answers: what it is asked, and where its answer ends."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.records import ASSISTANT, Message, Piece
from jaxmoe.chat.templates import ChatTemplate, TemplateFault
from jaxmoe.chat.turns import TrainedTurns
from jaxmoe.errors import UserError


def with_usual_end(ends: EndTokens, template: ChatTemplate | None) -> EndTokens:
    """With what ends a turn of the template as the first of those at which generation stops, if it is none of them."""
    usual = None if template is None else TrainedTurns(template, ends).usual_end
    return (
        ends
        if usual is None or usual in ends.stops
        else dataclasses.replace(ends, stops=(usual, *ends.stops))
    )


def stop_ids(tokenizer: Tokenizer, ends: EndTokens, template: ChatTemplate | None) -> list[int]:
    """Ids of the tokens at which an answer ends, whatever the model's folder says of them."""
    stops = with_usual_end(ends, template).stops
    return [i for token in stops if (i := tokenizer.token_to_id(token)) is not None]


def asked(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids that a model answers to.

    Raises:
        UserError: the template does not take the messages.
    """
    try:
        text = template.render(messages, generation_prompt=True)
    except TemplateFault as fault:
        raise UserError(
            f"{template.origin} does not take the conversation ({fault}), expected one that does: use another template"
        ) from fault
    return tokenizer.encode(text, add_special_tokens=False).ids


class Dialogue:
    """Turns of a user and of the model, in a template.

    Args:
        template: that renders them.
        tokenizer: text to ids.
        system: what is said before the first turn.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, system: str | None = None):
        self._template = template
        self._tokenizer = tokenizer
        self._messages = [] if system is None else [Message("system", (Piece(system),))]

    def ask(self, text: str) -> list[int]:
        """The ids of the conversation with one more turn of the user, to which the model answers."""
        self._messages.append(Message("user", (Piece(text),)))
        return asked(self._template, self._tokenizer, self._messages)

    def answer(self, ids: Iterable[int]) -> Iterator[str]:
        """Texts of the answer's tokens as they come; with the last one it becomes a turn."""
        stream, said = DecodeStream(skip_special_tokens=True), []
        for token in ids:
            text = stream.step(self._tokenizer, token)
            if text is not None:
                said.append(text)
                yield text
        self._messages.append(Message(ASSISTANT, (Piece("".join(said)),)))
