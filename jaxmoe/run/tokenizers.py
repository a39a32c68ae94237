"""The tokenizer of a run: given, the model's, or trained on its data; and what of it is kept."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from jaxmoe.config import RunConfig, TrainTokenizer
from jaxmoe.data import TOKENIZER_FILES, load_tokenizer, save_tokenizer, train_byte_bpe, vocabulary_size
from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, partial, write_atomically
from jaxmoe.parallel import processes
from jaxmoe.run.folder import RunLayout

TOKENIZER_BYTES = 2**26
"""Training text that a new tokenizer learns from. Where every word is another one it takes ten times as much memory."""

_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"


def open_tokenizer(
    config: RunConfig,
    model_folder: Path | None,
    vocab_size: int,
    texts: Callable[[], Iterable[str]],
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer and the folder that it was read from, None if it was just made.

    Args:
        config: the run.
        model_folder: checkpoint folder whose tokenizer is the default, or None.
        vocab_size: V of the model; every token id of the tokenizer must be below it.
        texts: at most `TOKENIZER_BYTES` of the data, to train one on.

    Raises:
        UserError: there is none, it is not readable, or it does not fit the model.
    """
    tokenizer, folder = _found(config, model_folder, vocab_size, texts)
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"data.tokenizer: its largest token id is {needed - 1} but the model's vocab_size is {vocab_size}: "
            "give a tokenizer that fits the model"
        )
    return tokenizer, folder


def _found(
    config: RunConfig, model_folder: Path | None, vocab_size: int, texts: Callable[[], Iterable[str]]
) -> tuple[Tokenizer, Path | None]:
    given = config.data.tokenizer
    if isinstance(given, TrainTokenizer):
        kept = RunLayout(Path(config.output_dir)).tokenizer
        if RunLayout(Path(config.output_dir)).holds_run() and kept.exists():  # a run that goes on keeps it
            return load_tokenizer(kept, vocab_size), kept
        return train_byte_bpe(texts(), given.train_bpe, given.special_tokens), None
    if given is not None:
        path = Path(given).expanduser()
        return load_tokenizer(path, vocab_size), _folder_of(path)
    if model_folder is None:
        raise UserError(
            "data.tokenizer: a model with random weights has none; give a path or {train_bpe: SIZE}"
        )
    return load_tokenizer(model_folder, vocab_size), model_folder


def keep_tokenizer(
    config: RunConfig, tokenizer: Tokenizer, template: str | None = None, stops: Sequence[int] = ()
) -> None:
    """Write what was made for this run into its folder.

    Args:
        config: the run.
        tokenizer: written if it was trained.
        template: in Jinja, for conversations, unless it is the tokenizer's own.
        stops: tokens at which generation ends, of a tokenizer that was trained.
    """
    if isinstance(config.data.tokenizer, TrainTokenizer):
        processes.first(lambda: _write(RunLayout(Path(config.output_dir)).tokenizer, tokenizer, stops))
    if template is not None:
        processes.first(lambda: _write_template(RunLayout(Path(config.output_dir)).chat_template, template))


def _write(kept: Path, tokenizer: Tokenizer, stops: Sequence[int]) -> None:
    if kept.exists():
        return
    unfinished = partial(kept)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        save_tokenizer(tokenizer, unfinished)
        if stops:
            (unfinished / _GENERATION).write_text(json.dumps({"eos_token_id": list(stops)}) + "\n", "utf-8")
        unfinished.rename(kept)  # whole or not there, whenever the process is killed
    except OSError as error:
        raise cannot_write(f"{kept}: cannot write the tokenizer", error) from error


def _write_template(kept: Path, template: str) -> None:
    if not kept.exists():
        write_atomically(kept, template)


def tokenizer_files(config: RunConfig) -> dict[str, Path | None]:
    """Files of a tokenizer that does not come with the model, by name; None for those that it lacks."""
    layout, given = RunLayout(Path(config.output_dir)), config.data.tokenizer
    files: dict[str, Path | None] = {}
    if given is not None:
        folder = (
            layout.tokenizer if isinstance(given, TrainTokenizer) else _folder_of(Path(given).expanduser())
        )
        files = {name: folder / name if (folder / name).is_file() else None for name in TOKENIZER_FILES}
    if isinstance(given, TrainTokenizer) and (layout.tokenizer / _GENERATION).exists():
        files[_GENERATION] = layout.tokenizer / _GENERATION
    if layout.chat_template.exists():
        files[_TEMPLATE] = layout.chat_template
    return files


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
