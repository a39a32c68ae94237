"""The sections of a run's configuration: one frozen model each, one described field per key."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from jaxmoe.files import why_unusable

MAX_TOKENS_PER_STEP = 2**28
"""A batch of so many tokens takes each process some gigabytes."""

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4); take what was meant, in nested values too."""
    if isinstance(value, Mapping):
        return {key: _float_from_yaml(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_float_from_yaml(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _float32(value: float) -> float:
    """Training computes in float32, where what is larger is infinity and what is smaller is 0."""
    if value and not 2.0**-126 <= abs(value) < 2.0**128:
        raise ValueError(f"found {value!r}, expected a number that float32 holds, from 1.2e-38 to 3.4e+38")
    return value


def _tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"found {value!r}, whose character {error.start} is half a surrogate pair; expected text that UTF-8 "
            "can hold"
        ) from None
    return value


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a non-empty string")
    return value


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    return "mapping" if isinstance(value, Mapping | BaseModel) else None


def _path(value: str) -> str:
    # Who exports a run may not be allowed to see its data.
    unusable = why_unusable(value, allow=(PermissionError,))
    if unusable is not None:
        raise ValueError(f"{unusable}, expected another one")
    return str(Path(value).expanduser()) if value.startswith("~") else value


T = TypeVar("T")
Number = Annotated[
    float, BeforeValidator(_float_from_yaml), Field(allow_inf_nan=False), AfterValidator(_float32)
]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # steps and tokens are counted in int32
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Prose = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Prose, AfterValidator(_filled)]
PathText = Annotated[Text, AfterValidator(_path)]
Json = Annotated[dict[str, JsonValue], BeforeValidator(_float_from_yaml)]
Items = Annotated[tuple[T, ...], BeforeValidator(_tuple_from_list)]


class Section(BaseModel):
    """Unknown keys are refused, and so are values of another type: "8" is no integer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class QuantizationConfig(Section):
    """Frozen weights in few bits under adapters (QLoRA), as bitsandbytes has them or as the checkpoint does."""

    kind: Literal["nf4", "fp4", "int8", "keep"] = Field(
        default="nf4",
        description="nf4 and fp4: 4 bits and a scale per block; int8: 8 bits and a scale per row; keep: what the "
        "checkpoint has in FP8, MXFP4, nf4, fp4 or int8 stays as it is.",
    )
    double_quant: bool = Field(
        default=False, description="Quantise the scales too: 4.13 bits a weight instead of 4.5."
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="Weights that share a scale, of nf4 and fp4."
    )

    @model_validator(mode="after")
    def _nothing_beside_keep(self) -> "QuantizationConfig":
        beside = sorted(self.model_fields_set - {"kind"})
        if self.kind == "keep" and beside:
            raise ValueError(
                f"found {beside[0]} beside kind 'keep', which leaves weights as the checkpoint has them; expected kind "
                "alone"
            )
        return self


class ModelConfig(Section):
    """Which model, and in which precision it computes."""

    path: PathText | None = Field(default=None, description="Folder or hub id of a Hugging Face checkpoint.")
    config: (
        Annotated[
            Annotated[PathText, Tag("path")] | Annotated[Json, Tag("mapping")],
            Discriminator(_kind),
        ]
        | None
    ) = Field(
        default=None,
        description="For random weights: a config.json file, or its content as a mapping. Exactly one of "
        "`path` and `config` is given.",
    )
    # Not float16: without loss scaling its gradients underflow to zero, silently.
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Dtype that the forward and backward pass compute in."
    )
    quantization: (
        Annotated[
            Annotated[Literal["nf4", "fp4", "int8", "keep"], Tag("path")]
            | Annotated[QuantizationConfig, Tag("mapping")],
            Discriminator(_kind),
        ]
        | None
    ) = Field(
        default=None,
        description="Hold the frozen weights of experts and linear layers in few bits: nf4, fp4 or int8, or keep, for "
        "those that the checkpoint has in FP8, MXFP4 or bitsandbytes' formats; or a mapping with `kind`, "
        "`double_quant` and `block_size`. Only beside `adapter`. null: in dtype.",
    )
    remat: bool = Field(
        default=True,
        description="Gradient checkpointing: keep each layer's input only and recompute the rest in the "
        "backward pass.",
    )

    @property
    def packing(self) -> QuantizationConfig | None:
        """`quantization` in full."""
        short = self.quantization
        return QuantizationConfig(kind=short) if isinstance(short, str) else short

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.config is None):
            found = "neither" if self.path is None else "both"
            raise ValueError(
                f"found {found} of `path` and `config`, expected exactly one (set the other to null)"
            )
        return self


class TrainTokenizer(Section):
    """A tokenizer to be trained on the run's own data."""

    train_bpe: Annotated[int, Field(ge=1, le=2**20)] = Field(
        description="Tokens in a byte-level BPE vocabulary trained on the data."
    )


class DataConfig(Section):
    """Where the text comes from and how it becomes sequences."""

    path: PathText = Field(description="A .txt, .jsonl or .parquet file, or a folder of them.")
    eval_path: PathText | None = Field(default=None, description="The same, held out for evaluation.")
    eval_fraction: Annotated[Number, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Fraction of the documents of `path` held out for evaluation, 0 to 0.5."
    )
    eval_tokens: Count | None = Field(default=None, description="Tokens per evaluation at most. null: all.")
    format: Literal["text"] = Field(default="text", description="Kind of record.")
    field: Text = Field(
        default="text", description="Field or column of .jsonl and .parquet files with the text."
    )
    include: Items[Text] | None = Field(
        default=None,
        description="Glob patterns of the files to read from a folder. null: all that can be read.",
    )
    exclude: Items[Text] = Field(default=(), description="Glob patterns of files to leave out.")
    max_record_bytes: Annotated[int, Field(ge=2**10, le=2**31 - 1)] = Field(
        default=2**25,
        description="Longest line of a .jsonl file and longest text in a .parquet one; both are read in one piece. "
        ".txt files may have any size.",
    )
    sequence_length: Annotated[int, Field(ge=2, le=2**20)] = Field(description="Tokens per sequence.")
    packing: bool = Field(
        default=True, description="Fill sequences with several documents, which do not attend to each other."
    )
    tokenizer: (
        Annotated[
            Annotated[PathText, Tag("path")] | Annotated[TrainTokenizer, Tag("mapping")],
            Discriminator(_kind),
        ]
        | None
    ) = Field(
        default=None,
        description="A tokenizer.json or its folder, or {train_bpe: vocabulary size} to train one on the data (on "
        "64 MiB of it, drawn evenly, if it has more). null: that of the model.",
    )

    @model_validator(mode="after")
    def _one_evaluation(self) -> "DataConfig":
        if self.eval_path is not None and self.eval_fraction > 0:
            raise ValueError(
                f"found both `eval_path` and `eval_fraction` {self.eval_fraction}, expected at most one"
            )
        return self


class OptimizerConfig(Section):
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for matrices, AdamW for embeddings, output head, norms and biases.",
    )
    learning_rate: Positive = Field(description="Highest learning rate of the schedule.")
    weight_decay: NotNegative = Field(
        default=0.1,
        description="Fraction of a weight removed per unit of learning rate; never of norms and biases.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup_steps: Index = Field(
        default=0, description="Steps of linear warm-up, from learning_rate/warmup_steps."
    )
    final_fraction: Fraction = Field(
        default=0.1,
        description="Learning rate of the last step over the highest; ignored by schedule constant.",
    )
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_tuple_from_list)] = Field(
        default=(0.9, 0.95), description="AdamW: decay of the first and of the second moment."
    )
    eps: Positive = Field(default=1e-8, description="AdamW: added to the root of the second moment.")
    clip_norm: Positive | None = Field(
        default=1.0, description="Largest global gradient norm. null: no clipping."
    )
    momentum: Decay = Field(default=0.95, description="Muon: decay of the momentum.")
    nesterov: bool = Field(default=True, description="Muon: orthogonalise the momentum one step ahead.")
    scale: Literal["rms", "jordan", "spectral"] = Field(
        default="rms",
        description="Muon: factor on the update of an (out, in) matrix: 0.2 sqrt(max(out, in)), "
        "sqrt(max(1, out/in)) or sqrt(out/in). With rms, learning rates of AdamW carry over.",
    )
    coefficients: Literal["you_jiacheng", "jordan", "polar_express"] = Field(
        default="you_jiacheng", description="Muon: polynomials of the Newton-Schulz iteration."
    )
    freeze_idle: bool = Field(
        default=False,
        description="Muon: a matrix whose gradient is exactly zero, such as that of an expert that got no token, stays "
        "where it is in that step. Otherwise its old momentum moves it at full size.",
    )
    router: Literal["muon", "adamw"] = Field(
        default="muon", description="Muon: the optimiser of router matrices."
    )
    adam_learning_rate: Positive | None = Field(
        default=None, description="Highest learning rate of what AdamW takes. null: learning_rate."
    )


class BalanceConfig(Section):
    """Losses that keep experts evenly loaded and router logits small."""

    aux_loss: NotNegative = Field(default=0.0, description="Weight of the load-balancing loss.")
    z_loss: NotNegative = Field(default=0.0, description="Weight of the router z-loss.")


class AdapterConfig(Section):
    """Low-rank adapters (LoRA), trained instead of the weights. Names and rules are PEFT's; ranks are per expert."""

    kind: Literal["lora"] = Field(default="lora", description="Kind of adapter.")
    path: PathText | None = Field(
        default=None,
        description="Folder of a PEFT adapter to go on with. It says all of the following but dropout and "
        "learning_rate_ratio.",
    )
    rank: Count = Field(default=16, description="Width between the two factors of a pair.")
    alpha: Positive = Field(
        default=32.0, description="The pair is multiplied by alpha / rank, with rslora by alpha / sqrt(rank)."
    )
    rslora: bool = Field(default=False, description="Scale by the root of the rank (arXiv 2312.03732).")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = Field(
        default="default",
        description="How the factors begin, as in PEFT. default, gaussian: A at random and B zero; orthogonal: both at "
        "random. pissa, olora: as the largest singular values of the weights or a part of their QR, without which the "
        "base then is; the exported adapter has twice the rank and is for the unchanged model. loftq: as the largest "
        "of what model.quantization loses; the exported adapter is for the quantised model. All but the first two are "
        "for linear layers alone.",
    )
    dora: bool = Field(
        default=False,
        description="Train the lengths of the weights' rows apart from their directions (DoRA, arXiv 2402.09353), of "
        "linear layers alone.",
    )
    target_modules: Items[Text] | Text | None = Field(
        default=None,
        description="Linear layers and embeddings: a list of endings of names, a regular expression of whole names, or "
        "all-linear (without routers and the output head).",
    )
    target_parameters: Items[Text] = Field(
        default=(),
        description="Endings of names of other parameters, such as mlp.experts.gate_up_proj and mlp.experts.down_proj.",
    )
    exclude_modules: Items[Text] | Text | None = Field(
        default=None, description="What target_modules leaves out: endings, or a regular expression."
    )
    rank_pattern: dict[Text, Count] = Field(
        default={}, description="Other ranks, by regular expressions of ends of names."
    )
    alpha_pattern: dict[Text, Positive] = Field(default={}, description="Other alphas, likewise.")
    modules_to_save: Items[Text] = Field(
        default=(), description="Endings of modules that are trained as a whole beside the adapters."
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="Share of the inputs of A that training sets to zero, but of embeddings; of experts anew for every "
        "expert of a token (PEFT has none there, so that the adapter's folder says 0). null: that of path, else 0.",
    )
    learning_rate_ratio: Annotated[Number, Field(ge=1)] = Field(
        default=1.0,
        description="Learning rate of B over that of A, but for embeddings (LoRA+, arXiv 2402.12354; "
        "16 is common).",
    )

    @model_validator(mode="after")
    def _something(self) -> "AdapterConfig":
        given = self.model_fields_set - {"kind", "path", "dropout", "learning_rate_ratio"}
        own = sorted(name for name in given if getattr(self, name) != type(self).model_fields[name].default)
        if self.path is not None and own:
            raise ValueError(
                f"found `path` and {own[0]}, which the adapter in that folder says itself; expected one of them"
            )
        if self.path is None and not (self.target_modules or self.target_parameters):
            raise ValueError(
                "found neither target_modules nor target_parameters, expected what to adapt, such as target_modules "
                "all-linear and target_parameters [mlp.experts.gate_up_proj, mlp.experts.down_proj]"
            )
        return self


class MeshConfig(Section):
    """Devices along each axis; their product is the number of devices."""

    data: Count = Field(default=1, description="Replicas that split the batch.")
    fsdp: Count = Field(default=1, description="Devices that split both the batch and every parameter.")
    expert: Count = Field(default=1, description="Devices that split both the batch and the experts.")
    tensor: Count = Field(default=1, description="Devices that split heads, hidden widths and vocabulary.")

    @property
    def batch_shards(self) -> int:
        """Number of parts that a batch is split into."""
        return self.data * self.fsdp * self.expert


class TrainConfig(Section):
    """Length of the run, batch, and what is written when."""

    steps: Count = Field(description="Optimiser steps.")
    batch_size: Count = Field(description="Sequences per optimiser step, over all devices.")
    micro_batch_size: Count | None = Field(
        default=None,
        description="Sequences per forward and backward pass, over all devices. null: batch_size.",
    )
    checkpoint_every: Count = Field(default=100, description="Steps between checkpoints.")
    keep_checkpoints: Count = Field(default=2, description="Newest checkpoints to keep.")
    log_every: Count = Field(default=10, description="Steps between lines of metrics.jsonl.")
    eval_every: Count | None = Field(
        default=None, description="Steps between evaluations. null: at the end only."
    )
    seed: Seed = Field(default=0, description="Seed of initial weights and of the order of the data.")
    export: Annotated[
        Annotated[bool, Tag("mapping")] | Annotated[Literal["adapter", "merged", "both"], Tag("path")],
        Discriminator(lambda value: "path" if isinstance(value, str) else "mapping"),
    ] = Field(
        default=True,
        description="Write the Hugging Face folder output_dir/export at the end: the model, or of a run with `adapter` "
        "a PEFT adapter. merged: the model with it merged in instead; both: that as well, as output_dir/merged.",
    )
    export_quantization: Literal["none", "source"] = Field(
        default="none",
        description="Weights that the model's folder has quantised are written as bfloat16 (none) or in its format "
        "again (source).",
    )
    peak_tflops: Positive | None = Field(
        default=None,
        description="Peak of one device, 1e12 operations per second, for utilisation. null: by name.",
    )
    distributed: bool = Field(
        default=False, description="Several processes: call jax.distributed.initialize()."
    )

    @property
    def rows(self) -> int:
        """Sequences per forward and backward pass, over all devices."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def accumulation(self) -> int:
        """Forward and backward passes per optimiser step."""
        return self.batch_size // self.rows


class SampleConfig(Section):
    """Text to generate when the run ends."""

    prompt: Prose = Field(description="Text to continue.")
    tokens: Annotated[int, Field(ge=1, le=2**20)] = Field(
        default=64, description="Tokens to generate at most."
    )
    temperature: NotNegative = Field(
        default=0.8, description="Divides the logits. 0: always the likeliest token."
    )
    seed: Seed = Field(default=0, description="Seed of the draws.")
