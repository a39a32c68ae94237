"""``python -m jaxmoe.inspect data CONFIG.yaml``: what a run would train on, token by token."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.cli import ArgumentParser
from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, path_argument, write_atomically

if TYPE_CHECKING:
    from jaxmoe.chat.encoder import Example
    from jaxmoe.run.conversation_data import ConversationData
    from jaxmoe.run.data import RunData

_TIMED_ROWS = 1000
_PACKED_ROWS = 2000
"""Rows of a batch that are looked at, at most, to say how full they are."""


def main(argv: list[str]) -> None:
    """The command."""
    parser = ArgumentParser(
        prog="jaxmoe inspect data",
        description="Show what of its data a run trains on. Nothing is trained or written, but for prepared data.",
    )
    parser.add_argument("config", type=path_argument, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as for jaxmoe train")
    parser.add_argument("--rows", type=int, default=3, help="rows to show of each source (default: 3)")
    parser.add_argument("--html", type=path_argument, metavar="FILE", help="write a page instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object per example instead")
    options = parser.parse_args(argv)
    if options.rows < 0:
        raise UserError(f"--rows: found {options.rows}, expected 0 or more")
    if options.json and options.html:
        raise UserError("--json: found it beside --html, expected one of them")
    # Imported only now: a mistake in the options is reported without waiting for it.
    from contextlib import closing

    from jaxmoe.config import load_config
    from jaxmoe.run.data import open_data
    from jaxmoe.run.model import open_model

    config = load_config(Path(options.config), options.overrides)
    source = open_model(config.model)
    with closing(open_data(config, source.folder, source.spec.vocab_size)) as data:
        _show(data, options.rows, options.html, options.json, options.config)


def _show(data: "RunData", rows: int, page_file: str | None, as_json: bool, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.chat import display

    tokenizer = data.tokenizer
    if as_json:
        for where, example in _examples(data, rows):
            sys.stdout.write(display.json_line(tokenizer, example, where) + "\n")
        return
    figures = list(_figures(data))
    if page_file is not None:
        shown = ((where, tokenizer, example) for where, example in _examples(data, rows))
        try:
            write_atomically(Path(page_file), "".join(display.page(title, figures, shown)))
        except OSError as error:
            raise cannot_write(f"{page_file}: cannot write the page", error) from None
        sys.stdout.write(f"{page_file}\n")
        return
    console = Console(highlight=False, markup=False)
    for where, example in _examples(data, rows):
        console.rule(f"{where}, {len(example.ids)} tokens, {int((example.weights > 0).sum())} trained")
        console.print(display.coloured(tokenizer, example), soft_wrap=True)
    table = Table(show_header=False)
    for name, value in figures:
        table.add_row(name, value)
    console.print(table)


def _examples(data: "RunData", rows: int) -> "Iterator[tuple[str, Example]]":
    """The first rows of each source; of plain text, sequences as they are trained on."""
    from jaxmoe.run.conversation_data import ConversationData

    if not isinstance(data, ConversationData):
        yield from _sequences(data, rows)
        return
    for source in data.sources:
        for i in range(min(rows, len(source.train.rows))):
            encoded = source.train.encode((i,))
            if encoded.errors and data.config.data.bad_rows == "stop":
                raise UserError(encoded.errors[0])
            for example in encoded.examples:
                yield source.train.rows.where(i), example


def _sequences(data: "RunData", rows: int) -> "Iterator[tuple[str, Example]]":
    import numpy as np

    from jaxmoe.chat.encoder import Example
    from jaxmoe.model.batch import learning_batch

    number = 0
    for made in data.training_batches():
        batch = learning_batch(**made)
        for ids, weights, there in zip(batch.tokens, batch.weights, batch.segment_ids > 0, strict=True):
            if number == rows:
                return
            number += 1
            # A target's weight stands at the token before it.
            shifted = np.append(0, weights[:-1]).astype(np.float32)
            yield f"sequence {number}", Example(ids[there], shifted[there])


def _figures(data: "RunData") -> Iterator[tuple[str, str]]:
    """What there is to say of all of it."""
    from jaxmoe.run.conversation_data import ConversationData

    for line in data.told:
        yield "data", line
    if isinstance(data, ConversationData):
        yield from _lengths(data)
    for doubt in data.doubts({}):
        yield "warning", doubt
    yield "slots filled", f"{_filled(data):.2%} of sequences of {data.config.data.sequence_length}"


def _lengths(data: "ConversationData") -> Iterator[tuple[str, str]]:
    import numpy as np

    for number, source in enumerate(data.sources):
        count = min(_TIMED_ROWS, len(source.train.rows))
        begun = time.perf_counter()
        encoded = source.train.encode(range(count))
        seconds = time.perf_counter() - begun
        if data.prepared is not None:
            lengths = data.prepared[number].lengths()
        else:
            lengths = np.array([len(example.ids) for example in encoded.examples])
        if len(lengths):
            least, half, most = np.percentile(lengths, (0, 50, 100))
            yield (
                f"{source.name}: tokens per example",
                f"{least:.0f} to {most:.0f}, {lengths.mean():.0f} on average, half of them at most {half:.0f}",
            )
        per_thousand = seconds / count * 1000
        yield f"{source.name}: seconds per thousand rows", f"{per_thousand:.2f} on one core"


def _filled(data: "RunData") -> float:
    """Share of slots with a token, in sequences as they are trained on."""
    filled = slots = 0
    size = data.config.train.batch_size
    for made in itertools.islice(data.training_batches(), max(1, _PACKED_ROWS // size)):
        filled += int((made["segment_ids"] > 0).sum())
        slots += made["segment_ids"].size
    return filled / slots
