"""Conversations and other rows of which a part is trained, from one source or several."""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.chat.dialogue import asked, stop_ids
from jaxmoe.chat.encoder import Example
from jaxmoe.chat.ends import EndTokens
from jaxmoe.chat.prepared import About, Prepared, prepare
from jaxmoe.chat.records import Message, Piece
from jaxmoe.chat.templates import ChatTemplate, no_template
from jaxmoe.chat.workers import Source, Workers, arrays
from jaxmoe.config import DataConfig, RunConfig
from jaxmoe.data.conversations import (
    HeldOut,
    MixedSource,
    StreamedRows,
    conversation_batches,
    held_out_batches,
    shares,
)
from jaxmoe.data.tokenizer import digest
from jaxmoe.errors import UserError
from jaxmoe.run.conversation_sources import OpenSource, cache_folder, open_sources
from jaxmoe.run.data import RunData
from jaxmoe.run.display import RowProgress
from jaxmoe.run.tokenizers import keep_tokenizer

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of what encoders make of a row: prepared data of another one is not read."""

_MOST_WORKERS = 16
_TOLD_ERRORS = 5
_SAMPLED_ROWS = 200


@dataclasses.dataclass(frozen=True)
class ConversationData(RunData):
    """Rows of a run.

    Attributes:
        sources: at least one.
        template: of conversations, None where there are none.
        ends: the tokens that end turns.
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
        with RowProgress(name, len(source.rows)) as told:
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
        told = _Told()
        for encoded in self.workers.all(number):
            if encoded.errors and self.config.data.bad_rows == "stop":
                raise UserError(encoded.errors[0])
            for error in encoded.errors:
                told(error)
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


def open_conversations(config: RunConfig, model_folder: Path | None, vocab_size: int) -> ConversationData:
    """See `jaxmoe.run.data.open_data`."""
    opened = open_sources(config, model_folder, vocab_size)
    return ConversationData(
        config, opened.tokenizer, opened.eos, opened.sources, opened.template, opened.ends
    )


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
