"""What a run reads: its kind is found by the rows."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from tokenizers import Tokenizer

from jaxmoe.config import RunConfig
from jaxmoe.data import BatchSpec


class HeldOutFigures(Protocol):
    """Held-out batches of this process, and the metrics that their loss is turned into."""

    batches: Any

    def figures(self, nats: float) -> dict[str, float]:
        """Metrics by name, of the loss summed over all targets of all processes."""


@dataclasses.dataclass(frozen=True)
class RunData(abc.ABC):
    """Text or conversations, and the tokenizer that turns them into batches.

    Attributes:
        config: the run.
        tokenizer: text to tokens.
        eos: token that ends a document, None if the tokenizer has none.
    """

    config: RunConfig
    tokenizer: Tokenizer
    eos: int | None

    @property
    @abc.abstractmethod
    def told(self) -> list[str]:
        """What was read, a line each; the first one ends the line with which a run begins."""

    @property
    def stops(self) -> Sequence[int]:
        """Tokens at which generation ends."""
        return () if self.eos is None else (self.eos,)

    @abc.abstractmethod
    def keep(self) -> None:
        """Write what was made for this run into the run's folder."""

    @abc.abstractmethod
    def training_batches(self) -> Any:
        """This process's endless training batches; a step takes one: (batch_size / processes, T)."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> Sequence[HeldOutFigures]:
        """This process's held-out batches, of one micro-batch each."""

    def baselines(self) -> dict[str, float]:
        """Bits per byte that simple models reach on what is evaluated; nothing where that says nothing."""
        return {}

    def prompt(self, text: str) -> list[int]:
        """The ids with which a sample begins."""
        return self.tokenizer.encode(text).ids

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what still works for it."""

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

    def batch_spec(self, rows: int) -> BatchSpec:
        """Of so many rows in all processes."""
        data = self.config.data
        # A model that begins at random learns how documents begin after the token that ended the one before.
        # A checkpoint does without: prompts at inference do not start with it.
        context = self.eos if self.config.model.path is None else None
        return BatchSpec(
            sequence_length=data.sequence_length,
            batch_size=rows // jax.process_count(),
            packing=data.packing,
            seed=self.config.train.seed,
            eos=self.eos,
            context=context,
        )


def open_data(config: RunConfig, model_folder: Path | None, vocab_size: int) -> RunData:
    """Open a run's data and its tokenizer, training one if the config asks for it. Writes nothing into its folder.

    Args:
        config: the run.
        model_folder: checkpoint folder whose tokenizer is the default, or None.
        vocab_size: V of the model; every token id of the tokenizer must be below it.

    Raises:
        UserError: files are missing or malformed, no tokenizer is given, or it does not fit the model.
    """
    from jaxmoe.run.conversation_data import open_conversations
    from jaxmoe.run.formats import is_text
    from jaxmoe.run.text_data import open_text

    if is_text(config.data):
        return open_text(config, model_folder, vocab_size)
    return open_conversations(config, model_folder, vocab_size)


def _positions(model: Mapping[str, Any]) -> int | None:
    """max_position_embeddings, which folders of several models have in the part for text."""
    most = model.get("max_position_embeddings")
    if isinstance(most, int):
        return most
    parts = (model.get(name) for name in ("text_config", "thinker_config"))
    return next((_positions(part) for part in parts if isinstance(part, Mapping)), None)
