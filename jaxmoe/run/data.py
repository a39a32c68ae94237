"""The text of a run: documents, tokenizer, training batches and held-out batches."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxmoe.config import RunConfig, TrainTokenizer
from jaxmoe.data import (
    TOKENIZER_FILES,
    BatchSpec,
    Documents,
    Evaluation,
    byte_baselines,
    check_proportion,
    check_separable,
    end_of_document,
    evaluation_windows,
    load_tokenizer,
    open_documents,
    save_tokenizer,
    split_documents,
    train_byte_bpe,
    training_batches,
    vocabulary_size,
)
from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, partial
from jaxmoe.parallel import processes
from jaxmoe.run.folder import RunLayout

TOKENIZER_BYTES = 2**26
"""Training text that a new tokenizer learns from. Where every word is another one it takes ten times as much memory."""

BASELINE_BYTES = 2**24
"""Training text that the byte baselines count."""


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        config: the run.
        train: training documents.
        heldout: evaluation documents, None without evaluation.
        tokenizer: text to tokens.
        eos: token that ends a document, None if the tokenizer has none.
    """

    config: RunConfig
    train: Documents
    heldout: Documents | None
    tokenizer: Tokenizer
    eos: int | None

    def keep_tokenizer(self) -> None:
        """Write a tokenizer that was made for this run into the run's folder."""
        if isinstance(self.config.data.tokenizer, TrainTokenizer):
            processes.first(self._write_tokenizer)

    def _write_tokenizer(self) -> None:
        kept = _kept(self.config)
        if kept.exists():
            return
        unfinished = partial(kept)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            save_tokenizer(self.tokenizer, unfinished)
            unfinished.rename(kept)  # whole or not there, whenever the process is killed
        except OSError as error:
            raise cannot_write(f"{kept}: cannot write the tokenizer", error) from error

    def training_batches(self) -> Any:
        """This process's endless training batches; a step takes one: (batch_size / processes, T)."""
        count = jax.process_count()
        spec = self._batch_spec(self.config.train.batch_size // count)
        return training_batches(
            self.train, self.tokenizer, spec, process_index=jax.process_index(), process_count=count
        )

    @functools.cached_property
    def evaluation(self) -> Evaluation | None:
        """This process's held-out batches of one micro-batch each."""
        if self.heldout is None:
            return None
        count = jax.process_count()
        return evaluation_windows(
            self.heldout,
            self.tokenizer,
            self._batch_spec(self.config.train.rows // count),
            max_tokens=self.config.data.eval_tokens,
            process_index=jax.process_index(),
            process_count=count,
        )

    def baselines(self) -> dict[str, float]:
        """Bits per byte of a unigram and a bigram model of bytes, on the documents that are evaluated."""
        assert self.heldout is not None
        assert self.evaluation is not None
        covered = (self.heldout[i] for i in range(self.evaluation.num_documents))
        return byte_baselines(self.train, covered, max_train_bytes=BASELINE_BYTES)

    def doubts(self, model: Mapping[str, Any]) -> list[str]:
        """What may be meant and seldom is, a line each; ``model`` is the content of its config.json."""
        found = []
        length, most = self.config.data.sequence_length, _positions(model)
        if most is not None and length > most:
            found.append(
                f"data.sequence_length is {length:,} and the model's max_position_embeddings {most:,}: it has not seen "
                "positions beyond that"
            )
        if self.eos is None:
            found.append(
                "the tokenizer has no end-of-text token: nothing tells the model where documents end (name one as "
                "eos_token in tokenizer_config.json)"
            )
        return found

    def _batch_spec(self, rows: int) -> BatchSpec:
        data = self.config.data
        # A model that begins at random learns how documents begin after the token that ended the one before.
        # A checkpoint does without: prompts at inference do not start with it.
        context = self.eos if self.config.model.path is None else None
        return BatchSpec(
            sequence_length=data.sequence_length,
            batch_size=rows,
            packing=data.packing,
            seed=self.config.train.seed,
            eos=self.eos,
            context=context,
        )


def open_data(config: RunConfig, model_folder: Path | None, vocab_size: int) -> RunData:
    """Open a run's documents and its tokenizer, training one if the config asks for it. Writes nothing.

    Args:
        config: the run.
        model_folder: checkpoint folder whose tokenizer is the default, or None.
        vocab_size: V of the model; every token id of the tokenizer must be below it.

    Raises:
        UserError: files are missing or malformed, no tokenizer is given, or it does not fit the model.
    """
    data = config.data
    read = functools.partial(open_documents, field=data.field, max_record_bytes=data.max_record_bytes)
    documents = read(data.path, include=data.include, exclude=data.exclude)
    heldout = None
    if data.eval_path is not None:
        is_file = Path(data.eval_path).expanduser().is_file()  # patterns choose among the files of a folder
        heldout = read(
            data.eval_path,
            include=None if is_file else data.include,
            exclude=() if is_file else data.exclude,
        )
    elif data.eval_fraction:
        documents, heldout = split_documents(documents, data.eval_fraction, config.train.seed)
    check_proportion(
        documents, BatchSpec(data.sequence_length, config.train.batch_size, packing=data.packing)
    )
    tokenizer, folder = _tokenizer(config, model_folder, documents, vocab_size)
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"data.tokenizer: its largest token id is {needed - 1} but the model's vocab_size is {vocab_size}: "
            "give a tokenizer that fits the model"
        )
    eos = end_of_document(tokenizer, folder)
    for opened in filter(None, (documents, heldout)):
        check_separable(opened, tokenizer)
    return RunData(config, documents, heldout, tokenizer, eos)


def tokenizer_files(config: RunConfig) -> dict[str, Path | None]:
    """Files of a tokenizer that does not come with the model, by name; None for those that it lacks."""
    given = config.data.tokenizer
    if given is None:
        return {}
    folder = _kept(config) if isinstance(given, TrainTokenizer) else _folder_of(Path(given).expanduser())
    return {name: folder / name if (folder / name).is_file() else None for name in TOKENIZER_FILES}


def _tokenizer(
    config: RunConfig, model_folder: Path | None, documents: Documents, vocab_size: int
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer and the folder that it was read from, None if it was just made."""
    given = config.data.tokenizer
    if isinstance(given, TrainTokenizer):
        if (
            RunLayout(Path(config.output_dir)).holds_run() and _kept(config).exists()
        ):  # a run that goes on keeps it
            return load_tokenizer(_kept(config), vocab_size), _kept(config)
        return train_byte_bpe(sample(documents, TOKENIZER_BYTES), given.train_bpe), None
    if given is not None:
        path = Path(given).expanduser()
        return load_tokenizer(path, vocab_size), _folder_of(path)
    if model_folder is None:
        raise UserError(
            "data.tokenizer: a model with random weights has none; give a path or {train_bpe: SIZE}"
        )
    return load_tokenizer(model_folder, vocab_size), model_folder


def sample(documents: Documents, most: int) -> Documents:
    """Documents of at most so many bytes, or one, drawn evenly; all of them if they are no more."""
    if documents.total_bytes <= most:
        return documents
    drawn = np.random.default_rng(0).permutation(len(documents))
    size = np.cumsum(documents.sizes()[drawn])
    return documents.subset(np.sort(drawn[: max(1, np.searchsorted(size, most, "right"))]))


def _positions(model: Mapping[str, Any]) -> int | None:
    """max_position_embeddings, which folders of several models have in the part for text."""
    most = model.get("max_position_embeddings")
    if isinstance(most, int):
        return most
    parts = (model.get(name) for name in ("text_config", "thinker_config"))
    return next((_positions(part) for part in parts if isinstance(part, Mapping)), None)


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _kept(config: RunConfig) -> Path:
    return RunLayout(Path(config.output_dir)).tokenizer
