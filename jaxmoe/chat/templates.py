"""Chat templates: found, and rendered in transformers' sandbox."""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxmoe.chat.records import Message
from jaxmoe.errors import UserError, first_line, listed, quote
from jaxmoe.files import read_text, why_unusable

KEY = "data.chat_template"
"""The key of a run's configuration that names a template."""

_MAX_BYTES = 2**24
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?:'([^']*)'|"([^"]*)")\s*\)""")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WITH_TOOLS, _DEFAULT = "tool_use", "default"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFault(Exception):
    """What a template said of messages that it does not take."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What templates differ in beyond what they are documented to take.

    Attributes:
        arguments_as_text: tool calls have their arguments as JSON and not as a mapping.
        content_missing: a turn without text has the content None and not "".
    """

    arguments_as_text: bool = False
    content_missing: bool = False

    def written(self, message: Message) -> dict[str, Any]:
        """The message as a template reads it."""
        missing = self.content_missing and not message.pieces
        written: dict[str, Any] = {"role": message.role, "content": None if missing else message.content}
        written |= message.other
        if message.reasoning is not None:
            # Of these names each template reads one.
            written |= dict.fromkeys(_REASONING, message.reasoning)
        if message.tool_calls:
            written["tool_calls"] = [self._call(call) for call in message.tool_calls]
        return written

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.arguments_as_text and isinstance(function.get("arguments"), Mapping):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}


DIALECTS = tuple(Dialect(as_text, missing) for as_text in (False, True) for missing in (False, True))
"""Tried in this order until all that a turn says is rendered."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens that it may write. Small, and can be sent to another process.

    Attributes:
        source: in Jinja.
        origin: where it is from, for messages.
        special_tokens: by name, bos_token and so on.
        with_tools: another one, for conversations with tools; None where there is none.
        date: that stands where the template asks for today's; None if it does not ask.
    """

    source: str
    origin: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    with_tools: str | None = None
    date: datetime.date | None = None

    @property
    def marks(self) -> bool:
        """Whether it says itself what the model generates, by ``{% generation %}``."""
        return _MARKS.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        dialect: Dialect = DIALECTS[0],
        generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Raises:
            TemplateFault: the template does not take it.
        """
        return self._rendered(messages, tools, arguments, dialect, generation_prompt, marked=False)[0]

    def marked(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        dialect: Dialect = DIALECTS[0],
    ) -> tuple[str, list[tuple[int, int]]]:
        """`render` with the (begin, end) characters of what the template marks as generated.

        Raises:
            TemplateFault: the template does not take it.
        """
        return self._rendered(messages, tools, arguments, dialect, False, marked=True)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any] | None,
        dialect: Dialect,
        generation_prompt: bool,
        marked: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.with_tools if tools and self.with_tools is not None else self.source
        try:
            rendered: Any = render_jinja_template(  # a pair, whatever its annotation says
                conversations=[[dialect.written(message) for message in messages]],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **{**self.special_tokens, **(arguments or {})},
            )
        except Exception as error:  # a template may do anything that Jinja can
            raise TemplateFault(f"{type(error).__name__}: {first_line(error)}") from error
        texts, spans = rendered
        return texts[0], [(begin, end) for begin, end in spans[0]] if marked else []


def built_in() -> list[str]:
    """Names of the templates that come with jaxmoe."""
    folder = resources.files("jaxmoe.chat").joinpath("built_in")
    return sorted(
        entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja")
    )


def find_template(
    given: str | None, folder: Path | None, date: datetime.date | None = None, *, key: str = KEY
) -> ChatTemplate | None:
    """The template that is asked for, with the special tokens of a tokenizer's folder.

    Args:
        given: a file, the name of one of the folder's or of `built_in`; None is the folder's own.
        folder: of the tokenizer.
        date: that stands for today's, by default today's.
        key: what a user sets ``given`` by, for messages.

    Returns:
        None if none is asked for and the folder has none.

    Raises:
        UserError: there is none of that name, or a file is not readable.
    """
    config = {} if folder is None else _json(folder / "tokenizer_config.json")
    own = {} if folder is None else _own(folder, config)
    special = _special_tokens(folder, config)
    if given is None:
        if not own:
            return None
        named = own.get(_DEFAULT, next(iter(own.values())))
        return _dated(named, f"{folder}: its chat template", special, date, own.get(_WITH_TOOLS))
    if given in own:
        return _dated(own[given], f"{folder}: its chat template {given!r}", special, date)
    if given in built_in():
        file = resources.files("jaxmoe.chat").joinpath("built_in", f"{given}.jinja")
        return _dated(file.read_text("utf-8"), f"the chat template {given!r}", special, date)
    path = Path(given).expanduser()
    if why_unusable(given) is None and path.is_file():
        return _dated(_text(path), given, special, date)
    names = listed(sorted({*own, *built_in()}), 20)
    raise UserError(
        f"{key}: {quote(given)} is neither a file nor a known template, expected a .jinja file or one of "
        f"{names}"
    )


def no_template(folder: Path | None, key: str = KEY) -> UserError:
    """What to say where a conversation needs a template and there is none."""
    where = "the tokenizer" if folder is None else f"{folder}: the tokenizer"
    return UserError(
        f"{where} has no chat template, which conversations need, expected chat_template.jinja beside it: set "
        f"{key} to a .jinja file or to one of {', '.join(built_in())}"
    )


def _dated(
    source: str,
    origin: str,
    special: Mapping[str, str],
    date: datetime.date | None,
    with_tools: str | None = None,
) -> ChatTemplate:
    """With a fixed date in it: a run that goes on tomorrow must render what it rendered today."""
    asked = any(text is not None and "strftime_now(" in text for text in (source, with_tools))
    day = (date or datetime.date.today()) if asked else None

    def pinned(text: str) -> str:
        assert day is not None
        found = _NOW.sub(lambda match: repr(day.strftime(match[1] or match[2])), text)
        if "strftime_now(" in found:
            raise UserError(
                f"{origin} calls strftime_now with a format that it computes, expected a literal one: give a template "
                "with a fixed date as data.chat_template"
            )
        return found

    if day is not None:
        source, with_tools = pinned(source), None if with_tools is None else pinned(with_tools)
    template = ChatTemplate(source, origin, special, with_tools, day)
    _check_syntax(template)
    return template


def _check_syntax(template: ChatTemplate) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    for source in filter(None, (template.source, template.with_tools)):
        try:
            render_jinja_template(conversations=[], chat_template=source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{template.origin} is no Jinja template (line {error.lineno}: {first_line(error)}): mend it, or set "
                "data.chat_template to another"
            ) from None


def _own(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of a folder by name, files before what tokenizer_config.json says, as transformers has it."""
    found: dict[str, str] = {}
    configured = config.get("chat_template")
    if isinstance(configured, str):
        found[_DEFAULT] = configured
    elif isinstance(configured, list):
        found |= {
            entry["name"]: entry["template"]
            for entry in configured
            if isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
    older = _json(folder / "chat_template.json").get("chat_template")
    if isinstance(older, str):
        found[_DEFAULT] = older
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _text(file)
    if (folder / "chat_template.jinja").is_file():
        found[_DEFAULT] = _text(folder / "chat_template.jinja")
    return found


def _special_tokens(folder: Path | None, config: Mapping[str, Any]) -> dict[str, str]:
    """What transformers gives to templates: the text of each special token that has a name."""
    declared = {} if folder is None else {**_json(folder / "special_tokens_map.json"), **config}
    texts = {name: _token_text(declared.get(name)) for name in _SPECIAL}
    extra = declared.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        texts |= {str(name): _token_text(token) for name, token in extra.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({first_line(error)}); mend or remove it") from None
    return content if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        return read_text(file, _MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{file}: cannot be read ({reason}), expected a text file; give another one"
        ) from None
