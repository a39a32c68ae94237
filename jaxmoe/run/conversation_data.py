"""Conversations and other rows of which a part is trained, from one source or several."""

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmoe.chat.dialogue import asked, stop_ids, with_usual_end
from jaxmoe.chat.encoder import Encoder, Example, end_tokens
from jaxmoe.chat.formats import RecordReader, detect
from jaxmoe.chat.prepared import About, Prepared, prepare
from jaxmoe.chat.records import Conversation, Message, Piece, Record, Segments
from jaxmoe.chat.rows import Rows, open_rows
from jaxmoe.chat.templates import ChatTemplate, find_template, no_template
from jaxmoe.chat.turns import EndTokens, TrainOn
from jaxmoe.chat.workers import Source, Workers, arrays
from jaxmoe.config import DataConfig, MixedSourceConfig, RunConfig, TrainTokenizer
from jaxmoe.data import end_of_document
from jaxmoe.data.conversations import (
    HeldOut,
    MixedSource,
    StreamedRows,
    conversation_batches,
    held_out_batches,
    shares,
)
from jaxmoe.data.docstrings import DOCSTRINGS, docstring_file
from jaxmoe.data.tokenizer import digest
from jaxmoe.errors import UserError
from jaxmoe.run.data import RunData
from jaxmoe.run.tokenizers import TOKENIZER_BYTES, keep_tokenizer, open_tokenizer

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of what encoders make of a row: prepared data of another one is not read."""

_MOST_WORKERS = 16
_TOLD_ERRORS = 5
_SAMPLED_ROWS = 200


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
class ConversationData(RunData):
    """Rows of a run.

    Attributes:
        sources: at least one.
        template: of conversations, None where there are none.
        ends: the tokens that end turns.
        vocab_size: V of the model.
    """

    sources: tuple[OpenSource, ...]
    template: ChatTemplate | None
    ends: EndTokens

    @property
    def stops(self) -> Sequence[int]:
        """See `RunData.stops`; what ends a turn of the template is one of them, whatever the folder says."""
        return stop_ids(self.tokenizer, self.ends, self.template)

    def keep(self) -> None:
        """See `RunData.keep`."""
        given = (
            None if self.config.data.chat_template is None or self.template is None else self.template.source
        )
        keep_tokenizer(self.config, self.tokenizer, given, self.stops)

    def prompt(self, text: str) -> list[int]:
        """See `RunData.prompt`."""
        if self.config.sample is None or not self.config.sample.chat:
            return super().prompt(text)
        if self.template is None:
            raise no_template(None)
        return asked(self.template, self.tokenizer, [Message("user", (Piece(text),))])

    @functools.cached_property
    def workers(self) -> Workers:
        """Those that encode: training sources first, then held-out ones."""
        return Workers(self._all, worker_count(self.config.data))

    @functools.cached_property
    def _all(self) -> list[Source]:
        return [s.train for s in self.sources] + [s.heldout for s in self.sources if s.heldout is not None]

    @functools.cached_property
    def prepared(self) -> list[Prepared] | None:
        """The training examples of each source on disk; None where rows are encoded as they are needed."""
        if not self.config.data.prepare:
            return None
        return [
            self._prepare(number, source.name, source.train) for number, source in enumerate(self.sources)
        ]

    def _prepare(self, number: int, name: str, source: Source) -> Prepared:
        folder = cache_folder(self.config.data) / "prepared" / self._fingerprint(source)
        with _progress(name, len(source.rows)) as told:
            return prepare(
                self.workers, number, folder, skip=self.config.data.bad_rows == "skip", progress=told
            )

    def _fingerprint(self, source: Source) -> str:
        """Changes with anything that its examples depend on."""
        parts = [
            _VERSION,
            source.rows.fingerprint(),
            dataclasses.asdict(source.reader),
            source.encoder.settings(),
        ]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def told(self) -> list[str]:
        """See `RunData.told`."""
        rows = sum(len(source.train.rows) for source in self.sources)
        lines = [f"{rows:,} rows"]
        for number, source in enumerate(self.sources):
            if self.prepared is None:
                about = _sampled(source.train)
                if about.bad and self.config.data.bad_rows == "stop":
                    raise UserError(about.errors[0])
                lines += _told_of(source, about, about.rows, self.template)
            else:
                lines += _told_of(source, self.prepared[number].about, None, self.template)
        if self.prepared is not None:
            tokens = sum(made.about.tokens for made in self.prepared)
            steps = tokens / (self.config.train.batch_size * self.config.data.sequence_length)
            lines.append(f"an epoch has about {max(steps, 1):,.0f} steps")
        return lines

    def training_batches(self) -> Any:
        """See `RunData.training_batches`."""
        sizes = [len(source.train.rows) for source in self.sources]
        given = [source.config.weight for source in self.sources]
        by_size = shares(sizes, [s.config.epochs for s in self.sources], self.config.data.temperature)
        parts = [by_size[n] if share is None else share for n, share in enumerate(given)]
        mixed = [
            MixedSource(source.name, self._rows(number), share, self._fingerprint(source.train))
            for number, (source, share) in enumerate(zip(self.sources, parts, strict=True))
        ]
        return conversation_batches(
            mixed,
            self.batch_spec(self.config.train.batch_size),
            epoch_rows=sum(sizes),
            threads=1 if self.prepared is not None else max(2 * self.workers.count, 1),
            tokenizer=digest(self.tokenizer),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _rows(self, number: int) -> Any:
        if self.prepared is not None:
            made = self.prepared[number]
            if not made.about.examples:
                raise UserError(f"{self.sources[number].name}: none of its rows gives an example to train on")
            return made

        def encode(i: int) -> tuple[list[Example], list[str]]:
            encoded = self.workers.submit(number, (i,))()
            return encoded.examples, encoded.errors

        return StreamedRows(
            encode,
            len(self.sources[number].train.rows),
            skip=self.config.data.bad_rows == "skip",
            told=_Told(),
        )

    @functools.cached_property
    def evaluations(self) -> Sequence["_Perplexity"]:
        """See `RunData.evaluations`."""
        found: list[_Perplexity] = []
        evaluated = [source for source in self.sources if source.heldout is not None]
        for number, source in enumerate(evaluated, len(self.sources)):
            held_out = held_out_batches(
                source.name,
                self._held_out_examples(number),
                self.batch_spec(self.config.train.rows),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            found.append(_Perplexity(held_out, None if len(evaluated) == 1 else source.name))
        return found

    def _held_out_examples(self, number: int) -> list[Example]:
        most, examples, tokens = self.config.data.eval_tokens, list[Example](), 0
        for encoded in self.workers.all(number):
            if encoded.errors and self.config.data.bad_rows == "stop":
                raise UserError(encoded.errors[0])
            for example in encoded.examples:
                examples.append(example)
                tokens += len(example.ids)
                if most is not None and tokens >= most:
                    return examples
        return examples

    def close(self) -> None:
        """See `RunData.close`."""
        self.workers.close()


class _Perplexity:
    """Held-out examples of a source; see `jaxmoe.run.data.HeldOutFigures`."""

    def __init__(self, held_out: HeldOut, name: str | None):
        self.batches = held_out.batches
        self._size = held_out.size
        self._prefix = "eval" if name is None else f"eval/{name}"

    def figures(self, nats: float) -> dict[str, float]:
        loss = nats / self._size
        return {f"{self._prefix}/loss": loss, f"{self._prefix}/perplexity": math.exp(min(loss, 700.0))}


class _Told:
    """Warns of the first rows that are left out, and says once that there are more."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, error: str) -> None:
        self._count += 1
        if self._count <= _TOLD_ERRORS:
            _log.warning("left out: %s", error)
        elif self._count == _TOLD_ERRORS + 1:
            _log.warning("more rows are left out; data.bad_rows=stop stops at the first")


def worker_count(data: DataConfig) -> int:
    """How many processes tokenize."""
    if data.workers is not None:
        return data.workers
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def cache_folder(data: DataConfig) -> Path:
    """Where prepared data is kept."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxmoe"


def open_conversations(config: RunConfig, model_folder: Path | None, vocab_size: int) -> ConversationData:
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
    if isinstance(data.tokenizer, TrainTokenizer):
        # Nobody has said yet which of its tokens are for what, and a run that goes on must not see it otherwise.
        template = find_template(data.chat_template, None, _day(data))
        own = {} if eos is None else {"eos_token": tokenizer.id_to_token(eos)}
        template = None if template is None else dataclasses.replace(template, special_tokens=own)
        ends = with_usual_end(end_tokens(tokenizer, None, eos, data.train_on.end_tokens), template)
    else:
        template = find_template(data.chat_template, folder, _day(data))
        ends = end_tokens(tokenizer, model_folder or folder, eos, data.train_on.end_tokens)
    train_on = TrainOn(
        roles=data.train_on.roles,
        last_turn_only=data.train_on.last_turn_only,
        end_of_turn=data.train_on.end_of_turn,
        reasoning=data.train_on.reasoning,
    )

    def encoder(per_sequence: bool) -> Encoder:
        return Encoder(
            tokenizer,
            template,
            ends,
            train_on,
            data.sequence_length,
            long=data.long,
            per_sequence=per_sequence,
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
                Source(rows, reader, encoder(data.loss == "sequence")),
                None if held_out is None else Source(held_out, reader, encoder(False)),
            )
        )
    _check_names(sources)
    return ConversationData(config, tokenizer, eos, tuple(sources), template, ends)


def _day(data: DataConfig) -> datetime.date | None:
    return None if data.template_date is None else datetime.date.fromisoformat(data.template_date)


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


def _told_of(
    source: OpenSource, about: About, sampled: int | None, template: ChatTemplate | None
) -> list[str]:
    """What a source has, and what of it is not as one would expect; ``sampled`` is how many rows were looked at."""
    line = f"{source.name}: {len(source.train.rows):,} rows of {source.format}"
    if template is not None and source.format not in ("text", "segments", "tokens"):
        line += f", {template.origin}"
    share = about.trained / max(about.tokens, 1)
    where = "" if sampled is None else f" in the first {sampled:,} rows"
    line += f", {about.examples:,} examples of {about.tokens:,} tokens{where}, {share:.1%} trained"
    lines = [line]
    if about.bad:
        lines.append(f"{source.name}: {about.bad:,} rows cannot be used and are left out: {about.errors[0]}")
    return lines + [f"{source.name}: {count:,} x {note}" for note, count in sorted(about.notes.items())]


def _sampled(source: Source) -> About:
    """The first rows, of a source that is not read before the run."""
    encoded = source.encode(range(min(_SAMPLED_ROWS, len(source.rows))))
    lengths, _, weights = arrays(encoded.examples)
    return About(
        rows=len(encoded.counts),
        examples=len(lengths),
        tokens=int(lengths.sum()),
        trained=int(np.count_nonzero(weights)),
        bad=len(encoded.errors),
        errors=tuple(encoded.errors[:1]),
        notes=dict(encoded.notes),
    )


class _progress:
    """Shows how many rows are done, on a terminal."""

    def __init__(self, name: str, total: int):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]prepare {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=jax.process_index() != 0 or not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Callable[[int], Any]:
        self._progress.start()
        return lambda rows: self._progress.update(self._task, completed=rows)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
