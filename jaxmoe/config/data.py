"""The data of a run: where it is, how rows become tokens, and what of them is trained."""

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from jaxmoe.config.fields import (
    Count,
    Index,
    Items,
    Json,
    Number,
    PathText,
    Positive,
    Section,
    Text,
    kind_of,
)

MAX_WORKERS = 256


def _date(value: str) -> str:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"found {value!r}, expected a date like 2026-01-31, in quotes") from None
    return value


class TrainTokenizer(Section):
    """A tokenizer to be trained on the run's own data."""

    train_bpe: Annotated[int, Field(ge=1, le=2**20)] = Field(
        description="Tokens in a byte-level BPE vocabulary trained on the data."
    )
    special_tokens: Items[Text] = Field(
        default=("<|endoftext|>",),
        description="Tokens that text is not split into, with the first ids: the first one ends documents, a chat "
        "template may need more.",
    )


class TrainOnConfig(Section):
    """Which tokens of a conversation count in the loss."""

    roles: Items[Text] = Field(
        default=("assistant",), description="Whose turns, unless a message has `train` or `weight`."
    )
    last_turn_only: bool = Field(default=False, description="Of those, only the last.")
    end_of_turn: Literal["turn", "all", "last", "none"] = Field(
        default="turn",
        description="The token that ends a turn: of trained turns, of all turns, of the last trained one, or none.",
    )
    reasoning: bool = Field(default=True, description="Whether what was thought is trained as well.")
    end_tokens: Items[Text] = Field(
        default=(),
        description="Tokens that end a turn, before those of generation_config.json and tokenizer_config.json.",
    )


class SourceConfig(Section):
    """Rows of one source."""

    path: PathText | None = Field(
        default=None,
        description="A file, a folder, a glob pattern or a hub dataset id. .txt: a document each; .jsonl, .json "
        "(.gz, .zst), .parquet and .arrow: rows.",
    )
    format: Literal[
        "auto",
        "text",
        "messages",
        "conversations",
        "prompt_completion",
        "instruction",
        "segments",
        "tokens",
    ] = Field(
        default="auto",
        description="Kind of row. auto: found by the columns. messages: role and content; conversations: from and "
        "value; prompt_completion: strings or messages; instruction: with input and output; segments: label and text; "
        "tokens: input_ids and labels.",
    )
    field: Text = Field(default="text", description="Field or column with the text of format text.")
    fields: dict[str, Text] = Field(
        default={},
        description="Names of other fields where they are not the usual ones, such as {content: value, messages: "
        "body.turns}.",
    )
    roles: dict[str, Text] = Field(default={}, description="Roles renamed, such as {bot: assistant}.")
    system: Literal["keep", "drop"] = Field(default="keep", description="System turns.")
    tools: Literal["keep", "drop"] = Field(
        default="keep", description="What rows say of functions that may be called."
    )
    chat_template_kwargs: Json = Field(
        default={}, description="Given to the chat template, such as {enable_thinking: false}."
    )
    include: Items[Text] | None = Field(
        default=None,
        description="Glob patterns of the files to read from a folder. null: all that can be read.",
    )
    exclude: Items[Text] = Field(default=(), description="Glob patterns of files to leave out.")
    eval_path: PathText | None = Field(default=None, description="The same, held out for evaluation.")
    eval_fraction: Annotated[Number, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Fraction of the rows of `path` held out for evaluation, 0 to 0.5."
    )

    @model_validator(mode="after")
    def _one_evaluation(self) -> "SourceConfig":
        if self.eval_path is not None and self.eval_fraction > 0:
            raise ValueError(
                f"found both `eval_path` and `eval_fraction` {self.eval_fraction}, expected at most one"
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether some of it is held out."""
        return self.eval_path is not None or self.eval_fraction > 0


class MixedSourceConfig(SourceConfig):
    """One of several sources."""

    name: Text | None = Field(
        default=None, description="What it is called in metrics. null: the last part of `path`."
    )
    epochs: Positive = Field(default=1.0, description="How often its rows are read while others' are once.")
    weight: Positive | None = Field(
        default=None,
        description="Its share of the rows that are read, beside the weights of the others: all of them have one or "
        "none has. null: by its size, `epochs` and `data.temperature`.",
    )

    @model_validator(mode="after")
    def _has_path(self) -> "MixedSourceConfig":
        if self.path is None:
            raise ValueError("found no `path`, expected that of the source")
        if self.weight is not None and self.epochs != 1.0:
            raise ValueError(f"found `epochs` {self.epochs} beside `weight`, expected one of them")
        return self


class DataConfig(SourceConfig):
    """Where the text comes from and how it becomes sequences."""

    sources: Items[MixedSourceConfig] = Field(
        default=(),
        description="Several sources instead of `path`, each with the keys above that are about one, and `name`, "
        "`weight` and `epochs`.",
    )
    temperature: Annotated[Number, Field(ge=1)] = Field(
        default=1.0, description="Of the mixture: sources are read by (rows x epochs)^(1/temperature)."
    )
    eval_tokens: Count | None = Field(default=None, description="Tokens per evaluation at most. null: all.")
    max_record_bytes: Annotated[int, Field(ge=2**10, le=2**31 - 1)] = Field(
        default=2**25,
        description="Longest line of a .jsonl file and longest text in a .parquet one; both are read in one piece. "
        ".txt files may have any size.",
    )
    sequence_length: Annotated[int, Field(ge=2, le=2**20)] = Field(description="Tokens per sequence.")
    packing: bool = Field(
        default=True, description="Fill sequences with several documents, which do not attend to each other."
    )
    long: Literal["truncate", "split", "drop"] = Field(
        default="truncate",
        description="Conversations with more tokens: their beginning is kept, they are cut into several, or left out. "
        "Plain text is always cut where a sequence ends.",
    )
    loss: Literal["token", "sequence"] = Field(
        default="token",
        description="What counts alike in the loss of a batch: every trained token, or conversation.",
    )
    chat_template: Text | None = Field(
        default=None,
        description="A .jinja file, the name of one of the tokenizer's templates, or of a common one: chatml, gemma, "
        "llama3, mistral, zephyr. null: that of the tokenizer.",
    )
    template_date: Annotated[Text, AfterValidator(_date)] | None = Field(
        default=None,
        description="For templates that write today's date, in quotes. null: the day when the run begins.",
    )
    train_on: TrainOnConfig = Field(default=TrainOnConfig(), description=TrainOnConfig.__doc__)
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop",
        description="Rows that cannot be used: stop at the first, or count them and leave them out.",
    )
    prepare: bool = Field(
        default=True,
        description="Tokenize conversations before the run and keep the result in `cache`. false: row by row as they "
        "are needed.",
    )
    cache: PathText | None = Field(
        default=None, description="Folder of prepared data. null: $XDG_CACHE_HOME/jaxmoe or ~/.cache/jaxmoe."
    )
    workers: Annotated[Index, Field(le=MAX_WORKERS)] | None = Field(
        default=None,
        description="Processes that tokenize conversations. 0: none besides the run. null: one per core, 16 at most.",
    )
    tokenizer: (
        Annotated[
            Annotated[PathText, Tag("path")] | Annotated[TrainTokenizer, Tag("mapping")],
            Discriminator(kind_of),
        ]
        | None
    ) = Field(
        default=None,
        description="A tokenizer.json or its folder, or {train_bpe: vocabulary size} to train one on the data (on "
        "64 MiB of it, drawn evenly, if it has more). null: that of the model.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "DataConfig":
        if (self.path is None) == (not self.sources):
            found = "neither" if self.path is None else "both"
            raise ValueError(f"found {found} of `path` and `sources`, expected exactly one")
        if self.sources:
            own = {name for name in SourceConfig.model_fields if getattr(self, name) != _default(name)}
            if own:
                raise ValueError(
                    f"found `{min(own)}` beside `sources`, which have their own; expected it in each of them"
                )
            weighted = [source for source in self.sources if source.weight is not None]
            if weighted and len(weighted) < len(self.sources):
                raise ValueError(
                    f"found a `weight` in {len(weighted)} of {len(self.sources)} `sources`, expected one in all or none"
                )
            if weighted and self.temperature != 1.0:
                raise ValueError(
                    f"found `temperature` {self.temperature} beside weights, expected one of them"
                )
        return self

    @property
    def mixed(self) -> tuple[MixedSourceConfig, ...]:
        """The sources, of which a run with a `path` has one."""
        if self.sources:
            return self.sources
        own = {name: getattr(self, name) for name in SourceConfig.model_fields}
        return (MixedSourceConfig.model_validate(own),)

    @property
    def evaluated(self) -> bool:
        """Whether something is held out."""
        return any(source.evaluates for source in (self, *self.sources))


def _default(name: str) -> object:
    return SourceConfig.model_fields[name].default
