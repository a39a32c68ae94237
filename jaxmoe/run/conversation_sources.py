"""The sources of a run on conversations: rows, their format, and what makes examples of them."""

import dataclasses
import datetime
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxmoe.chat.dialogue import with_usual_end
from jaxmoe.chat.encoder import Encoder
from jaxmoe.chat.ends import EndTokens, end_tokens
from jaxmoe.chat.formats import RecordReader, detect
from jaxmoe.chat.records import Conversation, Record, Segments
from jaxmoe.chat.rows import Rows, open_rows
from jaxmoe.chat.samples import TrainOn
from jaxmoe.chat.templates import ChatTemplate, find_template, no_template
from jaxmoe.chat.workers import Source
from jaxmoe.config import DataConfig, MixedSourceConfig, RunConfig, TrainTokenizer
from jaxmoe.data import end_of_document
from jaxmoe.data.docstrings import DOCSTRINGS, docstring_file
from jaxmoe.errors import UserError
from jaxmoe.run.tokenizers import TOKENIZER_BYTES, open_tokenizer


@dataclasses.dataclass(frozen=True)
class OpenSource:
    """A source of a run.

    Attributes:
        name: in metrics.
        config: of it.
        format: of its rows.
        train: its rows with what makes examples of them.
        heldout: the same, held out; None without evaluation.
    """

    name: str
    config: MixedSourceConfig
    format: str
    train: Source
    heldout: Source | None


@dataclasses.dataclass(frozen=True)
class OpenSources:
    """The sources of a run, and what they are tokenized with.

    Attributes:
        sources: at least one.
        tokenizer: text to tokens.
        eos: token that ends a document, None if the tokenizer has none.
        template: of conversations, None where there are none.
        ends: the tokens that end turns.
    """

    sources: tuple[OpenSource, ...]
    tokenizer: Tokenizer
    eos: int | None
    template: ChatTemplate | None
    ends: EndTokens


def open_sources(config: RunConfig, model_folder: Path | None, vocab_size: int) -> OpenSources:
    """See `jaxmoe.run.data.open_data`."""
    data = config.data
    opened = [_open_rows(source, data) for source in data.mixed]
    tokenizer, folder = open_tokenizer(
        config,
        model_folder,
        vocab_size,
        lambda: _texts([(rows, reader) for rows, reader, _ in opened], skip=data.bad_rows == "skip"),
    )
    eos = end_of_document(tokenizer, folder)
    template, ends = _template(data, tokenizer, folder, model_folder, eos)
    encoder = functools.partial(
        Encoder,
        tokenizer,
        template,
        ends,
        TrainOn(**data.train_on.model_dump(exclude={"end_tokens"})),
        data.sequence_length,
        long=data.long,
        vocab_size=vocab_size,
    )
    sources = []
    for number, (source, (rows, reader, held_out)) in enumerate(zip(data.mixed, opened, strict=True)):
        if template is None and reader.format in ("messages", "conversations", "instruction"):
            raise no_template(folder)
        if held_out is None and source.eval_fraction:
            rows, held_out = _split(rows, source.eval_fraction, config.train.seed)
        sources.append(
            OpenSource(
                _name(source, number),
                source,
                reader.format,
                Source(rows, reader, encoder(per_sequence=data.loss == "sequence")),
                None if held_out is None else Source(held_out, reader, encoder()),
            )
        )
    _check_names(sources)
    return OpenSources(tuple(sources), tokenizer, eos, template, ends)


def _template(
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path | None,
    model_folder: Path | None,
    eos: int | None,
) -> tuple[ChatTemplate | None, EndTokens]:
    """The chat template and the tokens that end its turns."""
    day = None if data.template_date is None else datetime.date.fromisoformat(data.template_date)
    if not isinstance(data.tokenizer, TrainTokenizer):
        template = find_template(data.chat_template, folder, day)
        return template, end_tokens(tokenizer, model_folder or folder, eos, data.train_on.end_tokens)
    # Nobody has said yet which of its tokens are for what, and a run that goes on must not see it otherwise.
    template = find_template(data.chat_template, None, day)
    if template is not None and eos is not None:
        own = {"eos_token": tokenizer.id_to_token(eos) or ""}
        template = dataclasses.replace(template, special_tokens=own)
    return template, with_usual_end(end_tokens(tokenizer, None, eos, data.train_on.end_tokens), template)


def cache_folder(data: DataConfig) -> Path:
    """Where prepared data is kept."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxmoe"


def _open_rows(source: MixedSourceConfig, data: DataConfig) -> tuple[Rows, RecordReader, Rows | None]:
    read = functools.partial(
        open_rows, cache=cache_folder(data) / "rows", max_record_bytes=data.max_record_bytes
    )
    assert source.path is not None
    path = docstring_file(cache_folder(data) / "rows") if source.path == DOCSTRINGS else source.path
    rows = read(path, include=source.include, exclude=source.exclude)
    fields = {"text": source.field, **source.fields} if source.field != "text" else source.fields
    format = source.format
    if format == "auto":
        format = detect(rows[0], fields=fields, where=rows.where(0))
    reader = RecordReader(
        format,
        fields=fields,
        roles=source.roles,
        system=source.system,
        tools=source.tools,
        template_arguments=source.chat_template_kwargs,
    )
    if source.eval_path is None:
        return rows, reader, None
    is_file = Path(source.eval_path).expanduser().is_file()  # patterns choose among the files of a folder
    held_out = read(
        source.eval_path,
        include=None if is_file else source.include,
        exclude=() if is_file else source.exclude,
    )
    return rows, reader, held_out


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """About this fraction held out, one at least and all but one at most, whatever the rows' order."""
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    if not count:
        raise UserError(
            f"{rows.where(0)}: the only row, expected two or more to hold out {fraction} of them: give more rows"
        )
    drawn = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return rows.subset(np.sort(drawn[count:])), rows.subset(np.sort(drawn[:count]))


def _name(source: MixedSourceConfig, number: int) -> str:
    if source.name is not None:
        return source.name
    assert source.path is not None
    return Path(source.path).name.split(".")[0] or f"source{number + 1}"


def _check_names(sources: Sequence[OpenSource]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"data.sources: {names.count(name)} of them are called {name!r}, expected different names: set "
                "their name"
            )


def _texts(opened: Sequence[tuple[Rows, RecordReader]], *, skip: bool) -> Iterator[str]:
    """What rows say, drawn evenly, to train a tokenizer on; ``skip`` passes over those that cannot be used."""
    total = sum(rows.num_bytes for rows, _ in opened)
    for rows, reader in opened:
        most = TOKENIZER_BYTES * rows.num_bytes // max(total, 1)
        taken = 0
        for i in np.random.default_rng(0).permutation(len(rows)).tolist():
            try:
                texts = list(_said(reader(rows[i], rows.where(i))))
            except UserError:
                if not skip:
                    raise
                continue
            taken += sum(len(text.encode()) for text in texts)
            yield from texts
            if taken >= most:
                break


def _said(record: Record) -> Iterable[str]:
    match record:
        case Conversation(messages):
            return (text for m in messages for text in (m.content, m.reasoning) if text)
        case Segments(pieces):
            return (piece.text for piece in pieces)
        case _:
            raise UserError("data.tokenizer: rows of token ids have a tokenizer already: give that one")
