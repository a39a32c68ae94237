"""Turns as rows have them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.chat.reading import (
    json_value,
    lookup,
    mapping,
    objects,
    parsed,
    shown,
    text,
    unexpected,
    weight_of,
    without_nulls,
)
from jaxmoe.chat.records import ASSISTANT, Message, Piece
from jaxmoe.errors import UserError, available, listed, quote

SYSTEM = "system"

MESSAGE_FIELDS = ("role", "content", "reasoning", "tool_calls", "name", "tool_call_id", "train", "weight")
"""What is known of a message, by our names for it."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_CARRIED = ("name", "tool_call_id")
_WITHOUT_CALLS = (SYSTEM, "user", "tool")
_TEXT_TYPES = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "content", "value")
_MEND = "mend or remove the row"


@dataclasses.dataclass(frozen=True)
class MessageReader:
    """Reads the turns of a row.

    Attributes:
        fields: our names (``MESSAGE_FIELDS``) to paths in a message; those that are missing have the same name.
        roles: what the rows call a role to what templates call it.
        known: the roles that there may be after that; None for any.
        unknown: the remedy for others.
        refused: roles that no template knows, with the remedy.
    """

    fields: Mapping[str, str]
    roles: Mapping[str, str]
    known: frozenset[str] | None = None
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def messages(self, at: str, value: object) -> tuple[Message, ...]:
        """All turns.

        Raises:
            UserError: something in them is not as expected; the message says where.
        """
        entries = objects(
            at,
            value,
            "an array of messages",
            f"give objects with {self._path('role')} and {self._path('content')}",
        )
        if not entries:
            raise UserError(f"{at} has no messages, expected at least one; remove the row")
        return tuple(self.message(f"{at}[{i}]", entry) for i, entry in enumerate(entries))

    def message(self, at: str, entry: Mapping[str, Any]) -> Message:
        """One turn, of an object whose keys are not null."""
        role = self._role(at, entry)
        pieces = content_pieces(f"{at}.{self._path('content')}", self._get(entry, "content"))
        reasoning = self._reasoning(at, entry)
        calls_at = f"{at}.{self._path('tool_calls')}"
        calls = tool_calls(calls_at, self._get(entry, "tool_calls"))
        if calls and role in _WITHOUT_CALLS:
            raise UserError(
                f"{calls_at} stands in a {role!r} message, expected an {ASSISTANT!r} one; mend its role"
            )
        if "function_call" in entry:
            raise UserError(
                f"{at}.function_call is the form before tool_calls, which templates do not read; write it as "
                '"tool_calls": [{"function": {...}}]'
            )
        if self._get(entry, "content") is None and not calls and (role != ASSISTANT or reasoning is None):
            key = self._path("content")
            raise UserError(
                f"{at} has no {key!r} (or null) and its role is {role!r}, expected a text; {available(key, entry)}; "
                f'give "" where it is empty, or set the data\'s fields'
            )
        names = (self._path("train"), self._path("weight"))
        weight = weight_of(at, self._get(entry, "train"), self._get(entry, "weight"), names)
        return Message(role, pieces, reasoning, calls, weight, self._other(at, entry))

    def _role(self, at: str, entry: Mapping[str, Any]) -> str:
        key = self._path("role")
        role = self._get(entry, "role")
        if role is None:
            raise UserError(
                f"{at} has no {key!r} (or null); {available(key, entry)}; set the data's fields to {{role: KEY}}, "
                "or its format to messages (role, content) or conversations (from, value) with fields "
                "{messages: COLUMN}"
            )
        at = f"{at}.{key}"
        role = text(at, role, "give the name of a role")
        role = self.roles.get(role, role)
        if not role:
            raise unexpected(at, role, "the name of a role", "mend or remove the row")
        if self.known is not None and role not in self.known:
            raise UserError(
                f"{at} is {quote(role)}, expected one of {listed(sorted(self.known | set(self.roles)), 20)}; say "
                f"what it stands for in the data's roles, for example {{{role}: user}}"
            )
        if role in self.refused:
            raise UserError(f"{at} is {quote(role)}, which chat templates do not know; {self.refused[role]}")
        return role

    def _reasoning(self, at: str, entry: Mapping[str, Any]) -> str | None:
        found = {}
        for key in dict.fromkeys((self._path("reasoning"), *_REASONING)):
            value = lookup(entry, key)
            if value is None:
                continue
            pieces = content_pieces(f"{at}.{key}", value)
            if any(piece.weight is not None for piece in pieces):
                raise UserError(
                    f"{at}.{key} has parts with a weight of their own, expected text that counts as its message does; "
                    "give the message the weight"
                )
            found[key] = "".join(piece.text for piece in pieces)
        if len(set(found.values())) > 1:
            raise UserError(
                f"{at} has different reasoning under {listed([*map(repr, found)], 4)}, expected one; remove the others"
            )
        return next(iter(found.values()), None)

    def _other(self, at: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        taken = {*MESSAGE_FIELDS, *_REASONING, *map(self._path, MESSAGE_FIELDS)}
        other = {key: value for key, value in entry.items() if key not in taken}
        for name in _CARRIED:
            value = self._get(entry, name)
            if value is not None:
                other[name] = text(f"{at}.{self._path(name)}", value)
        return without_nulls(at, other)

    def _path(self, name: str) -> str:
        return self.fields.get(name, name)

    def _get(self, entry: Mapping[str, Any], name: str) -> Any:
        return lookup(entry, self._path(name))


def content_pieces(at: str, value: object) -> tuple[Piece, ...]:
    """A text, or an array of parts of it, without empty ones.

    Raises:
        UserError: it is neither, or a part is no text.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (Piece(text(at, value)),) if value else ()
    if not isinstance(value, list):
        raise unexpected(at, value, "a string, or an array of parts with text", _MEND)
    pieces = tuple(_piece(f"{at}[{i}]", part) for i, part in enumerate(value))
    return tuple(piece for piece in pieces if piece.text)


def _piece(at: str, part: object) -> Piece:
    if not isinstance(part, Mapping):
        raise unexpected(at, part, "a part of the form {type: text, text: ...}", _MEND)
    kind = part.get("type")
    if kind == "thinking":
        raise UserError(f"{at} is a part of type 'thinking'; move it to the message's reasoning_content")
    if kind is not None and kind not in _TEXT_TYPES:
        raise UserError(
            f"{at} is a part of type {quote(kind)}, expected text, which is all that is trained; {_MEND}"
        )
    keys = [key for key in _TEXT_KEYS if part.get(key) is not None]
    if len(keys) != 1:
        what = f"has {' and '.join(map(repr, keys))}" if keys else f"is {shown(part)}"
        raise UserError(f"{at} {what}, expected its text under one of {', '.join(_TEXT_KEYS)}; {_MEND}")
    return Piece(text(f"{at}.{keys[0]}", part[keys[0]]), weight_of(at, part.get("train"), part.get("weight")))


def tool_calls(at: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """Calls as OpenAI's API has them, each ``function`` with its arguments as a mapping.

    Raises:
        UserError: something in them is not as expected.
    """
    if value is None:
        return ()
    calls = objects(at, value, "an array of tool calls", "give objects with function, of name and arguments")
    return tuple(_tool_call(f"{at}[{i}]", call) for i, call in enumerate(calls))


def _tool_call(at: str, call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        at_function, around = f"{at}.function", {key: call[key] for key in call if key != "function"}
        function = mapping(at_function, call["function"], "an object with name and arguments", _MEND)
    else:
        at_function, around = at, {key: call[key] for key in ("id", "type", "index") if key in call}
        function = json_value(at, {key: call[key] for key in call if key not in around})
    if "name" not in function:
        raise UserError(f"{at_function} has no 'name'; {available('name', function)}; {_MEND}")
    name = text(f"{at_function}.name", function["name"])
    if "arguments" not in function and len(function) > 1:
        raise UserError(
            f"{at_function} has no 'arguments'; {available('arguments', function)}; rename the others"
        )
    arguments = mapping(
        f"{at_function}.arguments",
        function.get("arguments", {}),
        "an object, or a string with one as JSON",
        "give the arguments by their names",
    )
    return {
        "type": "function",
        **json_value(at, around),
        "function": {**function, "name": name, "arguments": arguments},
    }


def tools(at: str, value: object) -> tuple[Mapping[str, Any], ...] | None:
    """Schemas of functions, each as ``{"type": "function", "function": {...}}``; None where there are none.

    Raises:
        UserError: something in them is not as expected.
    """
    remedy = "give objects with function, of name, description and parameters"
    value = parsed(at, value, "an array of tools")
    if isinstance(value, list):
        value = [parsed(f"{at}[{i}]", tool, "an object") for i, tool in enumerate(value)]
    found = [] if value is None else objects(at, value, "an array of tools", remedy)
    return tuple(_tool(f"{at}[{i}]", tool) for i, tool in enumerate(found)) or None


def _tool(at: str, tool: dict[str, Any]) -> dict[str, Any]:
    at_function = f"{at}.function" if "function" in tool else at
    around = tool if "function" in tool else {"type": "function"}
    flat = {key: tool[key] for key in tool if key != "type"}
    function = mapping(at_function, tool.get("function", flat), "an object with name and parameters", _MEND)
    if "name" not in function:
        raise UserError(f"{at_function} has no 'name'; {available('name', function)}; {_MEND}")
    text(f"{at_function}.name", function["name"])
    if "parameters" in function:
        function["parameters"] = mapping(
            f"{at_function}.parameters", function["parameters"], "a JSON schema, which is an object", _MEND
        )
    return {**json_value(at, {**around, "function": {}}), "function": function}
