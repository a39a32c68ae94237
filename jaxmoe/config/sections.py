"""The sections of a run's configuration: one frozen model each, one described field per key."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from jaxmoe.config.fields import (
    Count,
    Decay,
    Fraction,
    Index,
    Items,
    Json,
    NotNegative,
    Number,
    PathText,
    Positive,
    Prose,
    Section,
    Seed,
    Text,
    kind_of,
    tuple_from_list,
)

MAX_TOKENS_PER_STEP = 2**28
"""A batch of so many tokens takes each process some gigabytes."""


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
        fields = type(self).model_fields
        beside = [
            name for name in ("block_size", "double_quant") if getattr(self, name) != fields[name].default
        ]
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
            Discriminator(kind_of),
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
            Discriminator(kind_of),
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
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(tuple_from_list)] = Field(
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
        description="Learning rate of B and of DoRA's lengths over that of A, but for embeddings (LoRA+, "
        "arXiv 2402.12354; 16 is common).",
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
    indexer_loss: NotNegative = Field(
        default=0.0,
        description="Weight of the loss of indexers (sparse attention as DeepSeek-V3.2 has it): the divergence of "
        "attention's weights from their scores, over the selected keys. It trains them alone and nothing else does. "
        "0: they stay as they are.",
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
    export_mtp: Literal["declared", "present"] = Field(
        default="declared",
        description="Layers for multi-token prediction that the export's config.json counts: those that the model's "
        "does (declared), or none where its folder came without their tensors (present).",
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
    """Text to generate."""

    prompt: Prose | None = Field(default=None, description="Text to continue when the run ends.")
    prompts: Items[Prose] = Field(
        default=(), description="Several of them, continued at every evaluation as well."
    )
    chat: bool = Field(
        default=False,
        description="Prompts are what a user says, and the model answers in the chat template.",
    )
    tokens: Annotated[int, Field(ge=1, le=2**20)] = Field(
        default=64, description="Tokens to generate at most."
    )
    temperature: NotNegative = Field(
        default=0.8, description="Divides the logits. 0: always the likeliest token."
    )
    seed: Seed = Field(default=0, description="Seed of the draws.")

    @model_validator(mode="after")
    def _has_prompt(self) -> "SampleConfig":
        if (self.prompt is None) == (not self.prompts):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f"found {found} of `prompt` and `prompts`, expected exactly one")
        return self
