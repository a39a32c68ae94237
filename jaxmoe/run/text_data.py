"""Plain text: documents, their tokens one after the other."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.config import DataConfig, RunConfig
from jaxmoe.data import (
    BatchSpec,
    Documents,
    Evaluation,
    byte_baselines,
    check_proportion,
    check_separable,
    end_of_document,
    evaluation_windows,
    open_documents,
    split_documents,
    training_batches,
)
from jaxmoe.errors import UserError
from jaxmoe.run.data import RunData
from jaxmoe.run.tokenizers import TOKENIZER_BYTES, keep_tokenizer, open_tokenizer

_OF_ROWS = (
    *(
        "bad_rows",
        "chat_template",
        "chat_template_kwargs",
        "long",
        "loss",
        "roles",
        "system",
        "template_date",
    ),
    *("tools", "train_on"),
)
"""Keys of rows that mean something."""

BASELINE_BYTES = 2**24
"""Training text that the byte baselines count."""


@dataclasses.dataclass(frozen=True)
class TextData(RunData):
    """Documents of a run.

    Attributes:
        train: training documents.
        heldout: evaluation documents, None without evaluation.
    """

    train: Documents
    heldout: Documents | None

    @property
    def told(self) -> list[str]:
        """See `RunData.told`."""
        return [f"{self.train.num_documents:,} documents"]

    def keep(self) -> None:
        """See `RunData.keep`."""
        keep_tokenizer(self.config, self.tokenizer)

    def training_batches(self) -> Any:
        """See `RunData.training_batches`."""
        return training_batches(
            self.train,
            self.tokenizer,
            self.batch_spec(self.config.train.batch_size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    @property
    def evaluations(self) -> Sequence["_BitsPerByte"]:
        """See `RunData.evaluations`."""
        return () if self._evaluation is None else (_BitsPerByte(self._evaluation),)

    @functools.cached_property
    def _evaluation(self) -> Evaluation | None:
        if self.heldout is None:
            return None
        return evaluation_windows(
            self.heldout,
            self.tokenizer,
            self.batch_spec(self.config.train.rows),
            max_tokens=self.config.data.eval_tokens,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def baselines(self) -> dict[str, float]:
        """Bits per byte of a unigram and a bigram model of bytes, on the documents that are evaluated."""
        if self.heldout is None or self._evaluation is None:
            return {}
        covered = (self.heldout[i] for i in range(self._evaluation.num_documents))
        return byte_baselines(self.train, covered, max_train_bytes=BASELINE_BYTES)


class _BitsPerByte:
    """Held-out documents; see `jaxmoe.run.data.HeldOutFigures`."""

    def __init__(self, evaluation: Evaluation):
        self.batches = evaluation.batches
        self._num_bytes = evaluation.num_bytes

    def figures(self, nats: float) -> dict[str, float]:
        return {"eval/bits_per_byte": nats / math.log(2) / self._num_bytes}


def open_text(config: RunConfig, model_folder: Path | None, vocab_size: int) -> TextData:
    """See `jaxmoe.run.data.open_data`."""
    data = config.data
    _check_meant(config)
    field = data.fields.get("text", data.field)
    read = functools.partial(open_documents, field=field, max_record_bytes=data.max_record_bytes)
    assert data.path is not None
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
    tokenizer, folder = open_tokenizer(
        config, model_folder, vocab_size, lambda: sample(documents, TOKENIZER_BYTES)
    )
    eos = end_of_document(tokenizer, folder)
    for opened in filter(None, (documents, heldout)):
        check_separable(opened, tokenizer)
    return TextData(config, tokenizer, eos, documents, heldout)


def _check_meant(config: RunConfig) -> None:
    """Refuse what documents have nothing of, which whoever set it takes for done.

    Raises:
        UserError: such a key is set.
    """
    default = DataConfig.model_fields
    found = [name for name in _OF_ROWS if getattr(config.data, name) != default[name].default]
    found += [f"fields.{name}" for name in config.data.fields if name != "text"]
    if found:
        raise UserError(
            f"data.{found[0]}: found it set, and {config.data.path} is read as plain text, which has nothing of "
            "the kind: leave it out, or set data.format to what its rows are"
        )
    if config.sample is not None and config.sample.chat:
        raise UserError(
            f"sample.chat: found true, and {config.data.path} is read as plain text, which has no chat template: "
            "set it to false, or train on conversations"
        )


def sample(documents: Documents, most: int) -> Documents:
    """Documents of at most so many bytes, or one, drawn evenly; all of them if they are no more."""
    if documents.total_bytes <= most:
        return documents
    drawn = np.random.default_rng(0).permutation(len(documents))
    size = np.cumsum(documents.sizes()[drawn])
    return documents.subset(np.sort(drawn[: max(1, np.searchsorted(size, most, "right"))]))
