"""Which columns rows have, and the record that a row means."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxmoe.chat.messages import MESSAGE_FIELDS, SYSTEM, MessageReader, content_pieces, tools
from jaxmoe.chat.reading import lookup, mapping, objects, text, unexpected
from jaxmoe.chat.records import ASSISTANT, Conversation, Message, Piece, Record, Segments, Tokens
from jaxmoe.chat.token_rows import read_tokens
from jaxmoe.errors import UserError, available, listed, quote

Format = Literal[
    "messages", "conversations", "prompt_completion", "instruction", "segments", "tokens", "text"
]

FIELDS = (
    *(
        "messages",
        *MESSAGE_FIELDS,
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
    ),
    *("segments", "label", "text", "input_ids", "labels", "chat_template_kwargs"),
)
"""Our names for what rows have."""

_REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "segments": ("segments",),
    "tokens": ("input_ids",),
    "text": ("text",),
}
KNOWN_COLUMNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "instruction", "segments", "input_ids"}
)
"""Columns that plain text does not have."""

_SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}

_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "system": SYSTEM},
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_NO_ROLES = {
    "human": "set the data's format to conversations, or its roles to {human: user}",
    "gpt": "set the data's format to conversations, or its roles to {gpt: assistant}",
}
_MEND = "mend or remove the row"


def detect(
    row: Mapping[str, Any], *, fields: Mapping[str, str] | None = None, where: str = "the first row"
) -> Format:
    """The format of rows, by the columns of one of them that are not null.

    Args:
        row: one of them.
        fields: our names to paths in it, as for ``RecordReader``.
        where: it is, for messages.

    Raises:
        UserError: they have no format that is known, or more than one.
    """
    check_fields(fields or {})
    found = [name for name in get_args(Format) if _fits(row, name, fields or {})]
    columns = f"has the columns {listed([quote(name) for name in row], 12) or 'of none'}"
    if not found:
        needed = "; ".join(
            " and ".join(_path(name, field, {}) for field in _REQUIRED[name]) for name in _REQUIRED
        )
        raise UserError(
            f"{where}: {columns}, expected one of: {needed}; say in the data's fields how the row calls these"
        )
    if len(found) > 1:
        raise UserError(
            f"{where}: {columns}, which fit {' and '.join(found)}, expected one; set the data's format to it"
        )
    return found[0]


def _fits(row: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> bool:
    if name == "conversations" and "messages" in fields:  # which names the column of either
        return False
    return all(lookup(row, _path(name, field, fields)) is not None for field in _REQUIRED[name])


def _path(format: str, field: str, fields: Mapping[str, str]) -> str:
    default = _SHAREGPT.get(field, field) if format == "conversations" else field
    return fields.get(field, default)


def check_fields(fields: Mapping[str, str]) -> None:
    """Raises UserError for a name that is none of ours."""
    for name, path in fields.items():
        if name not in FIELDS:
            raise UserError(
                f"the data's fields have {quote(name)}; {available(name, FIELDS)}; use one of these"
            )
        if not isinstance(path, str) or not path:
            raise unexpected(
                f"the data's fields.{name}", path, "the name of a column, or a path in it", "give one"
            )


@dataclasses.dataclass(frozen=True)
class RecordReader:
    """Makes records of rows of one format.

    Attributes:
        format: what rows look like.
        fields: our names (``FIELDS``) to names in a row, or paths of names and list indices joined by dots. Those of
            messages and segments are looked up in each of them.
        roles: what rows call a role to what templates call it, beside the usual ones of conversations.
        system: whether system turns are kept.
        tools: whether what rows say of functions that may be called is.
        template_arguments: what templates are given besides; a row's chat_template_kwargs win over it.

    Raises:
        UserError: one of these is unknown.
    """

    format: Format
    _: dataclasses.KW_ONLY
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: Literal["keep", "drop"] = "keep"
    tools: Literal["keep", "drop"] = "keep"
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("format", self.format, Format),
            ("system", self.system, Literal["keep", "drop"]),
            ("tools", self.tools, Literal["keep", "drop"]),
        ):
            if value not in get_args(kind):
                raise unexpected(
                    f"the data's {name}", value, f"one of {', '.join(get_args(kind))}", "use one of these"
                )
        check_fields(self.fields)
        for name, role in self.roles.items():
            if not isinstance(role, str) or not role:
                raise unexpected(
                    f"the data's roles.{name}", role, "the name of a role", "give one, such as assistant"
                )

    def __call__(self, row: Mapping[str, Any], where: str) -> Record:
        """The record that a row means.

        Args:
            row: its columns.
            where: it is, which begins a message.

        Raises:
            UserError: something in it is not as expected; in one line, with its place, its value and the remedy.
        """
        try:
            return _READERS[self.format](self, row, where)
        except RecursionError:
            raise UserError(f"{where}: objects in objects too deep to be read; remove the row") from None

    def _chat(self, row: Mapping[str, Any], where: str) -> Conversation:
        messages = self._messages().messages(
            f"{where}: {self._path('messages')}", self._need(row, where, "messages")
        )
        return self._conversation(row, where, messages)

    def _prompt_completion(self, row: Mapping[str, Any], where: str) -> Record:
        at = [f"{where}: {self._path(name)}" for name in ("prompt", "completion")]
        prompt, completion = (self._need(row, where, name) for name in ("prompt", "completion"))
        if isinstance(prompt, list) and isinstance(completion, list):
            reader = self._messages()
            asked = tuple(
                map(_untrained, [f"{at[0]}[{i}]" for i in range(len(prompt))], reader.messages(at[0], prompt))
            )
            return self._conversation(row, where, asked + reader.messages(at[1], completion), weight=0.0)
        if isinstance(prompt, list) and isinstance(completion, str):
            raise unexpected(
                at[1], completion, "an array of messages, as the prompt is", "give both in one form"
            )
        if isinstance(prompt, str) and isinstance(completion, list):
            raise unexpected(at[1], completion, "a string, as the prompt is", "give both in one form")
        for place, value in zip(at, (prompt, completion), strict=True):
            if not isinstance(value, str):
                raise unexpected(place, value, "a string, or an array of messages", _MEND)
        if not completion:
            raise unexpected(at[1], completion, "a text to learn", "remove the row")
        return _segments((Piece(text(at[0], prompt), 0.0), Piece(text(at[1], completion), 1.0)))

    def _instruction(self, row: Mapping[str, Any], where: str) -> Conversation:
        parts = {name: self._need(row, where, name) for name in ("instruction", "output")}
        parts["input"] = lookup(row, self._path("input"))
        if parts["input"] is None:
            del parts["input"]
        parts = {name: text(f"{where}: {self._path(name)}", value) for name, value in parts.items()}
        for name in ("instruction", "output"):
            if not parts[name].strip():
                raise unexpected(f"{where}: {self._path(name)}", parts[name], "a text", "remove the row")
        more = parts.get("input", "")
        asked = f"{parts['instruction']}\n\n{more}" if more.strip() else parts["instruction"]
        messages = Message("user", (Piece(asked),)), Message(ASSISTANT, (Piece(parts["output"]),))
        return self._conversation(row, where, messages)

    def _template_free(self, row: Mapping[str, Any], where: str) -> Segments:
        at = f"{where}: {self._path('segments')}"
        label, content = self._path("label"), self._path("text")
        remedy = f"give objects with {label} and {content}"
        entries = objects(at, self._need(row, where, "segments"), "an array of segments", remedy)
        pieces = []
        for i, entry in enumerate(entries):
            flag = lookup(entry, label)
            if not isinstance(flag, bool):
                raise unexpected(f"{at}[{i}].{label}", flag, "true or false", remedy)
            pieces.append(Piece(text(f"{at}[{i}].{content}", lookup(entry, content), remedy), float(flag)))
        if not any(piece.text for piece in pieces):
            raise UserError(f"{at} has no text, expected segments with some; remove the row")
        return _segments(tuple(pieces), ends=False)

    def _plain(self, row: Mapping[str, Any], where: str) -> Segments:
        at = f"{where}: {self._path('text')}"
        content = text(at, self._need(row, where, "text"), "set the data's fields to the column of the text")
        if not content.strip():
            raise unexpected(at, content, "a text", "remove the row")
        return _segments((Piece(content, 1.0),))

    def _tokens(self, row: Mapping[str, Any], where: str) -> Tokens:
        ids = (self._path("input_ids"), self._need(row, where, "input_ids"))
        labels = self._path("labels")
        return read_tokens(where, row, ids, (labels, lookup(row, labels)))

    def _conversation(
        self, row: Mapping[str, Any], where: str, messages: tuple[Message, ...], weight: float | None = None
    ) -> Conversation:
        """Messages with what else a row says of them; ``weight`` is that of a system turn from a column."""
        system = lookup(row, self._path("system"))
        if system is not None and messages[0].role != SYSTEM:
            content = text(f"{where}: {self._path('system')}", system)
            first = Message(SYSTEM, content_pieces(where, content), weight=weight)
            messages = (first, *messages) if content else messages
        if self.system == "drop":
            messages = tuple(message for message in messages if message.role != SYSTEM)
            if not messages:
                raise UserError(f"{where}: system turns only, which the data's system drops; remove the row")
        arguments = lookup(row, at := self._path("chat_template_kwargs"))
        own = {} if arguments is None else mapping(f"{where}: {at}", arguments, "an object", _MEND)
        given = lookup(row, self._path("tools")) if self.tools == "keep" else None
        found = tools(f"{where}: {self._path('tools')}", given)
        return Conversation(messages, found, {**self.template_arguments, **own})

    def _messages(self) -> MessageReader:
        paths = {name: self._path(name) for name in MESSAGE_FIELDS}
        if self.format != "conversations":
            return MessageReader(paths, self.roles, refused=_NO_ROLES)
        roles = {**_SHAREGPT_ROLES, **self.roles}
        return MessageReader(paths, roles, known=frozenset(roles.values()))

    def _path(self, field: str) -> str:
        return _path(self.format, field, self.fields)

    def _need(self, row: Mapping[str, Any], where: str, field: str) -> Any:
        """What a row has to have."""
        path = self._path(field)
        value = lookup(row, path)
        if value is None:
            raise UserError(
                f"{where}: no {path!r} (or null), expected in the format {self.format}; {available(path, row)}; "
                f"set the data's format, or its fields to {{{field}: COLUMN}}"
            )
        return value


_READERS = {
    "messages": RecordReader._chat,
    "conversations": RecordReader._chat,
    "prompt_completion": RecordReader._prompt_completion,
    "instruction": RecordReader._instruction,
    "segments": RecordReader._template_free,
    "tokens": RecordReader._tokens,
    "text": RecordReader._plain,
}


def _untrained(at: str, message: Message) -> Message:
    """A message of a prompt, which has to say nothing else."""
    if message.weight or any(piece.weight for piece in message.pieces):
        raise UserError(f"{at} is to be trained and stands in the prompt; move it to the completion")
    pieces = tuple(dataclasses.replace(piece, weight=None) for piece in message.pieces)
    return dataclasses.replace(message, pieces=pieces, weight=0.0)


def _segments(pieces: tuple[Piece, ...], ends: bool = True) -> Segments:
    return Segments(tuple(piece for piece in pieces if piece.text), ends)
