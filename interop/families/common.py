"""What families share of reading a config.json: the usual fields, as specs of attention, experts and the model.

Each function reads the names that most families have, and its arguments say what differs. `options` are always further
fields of the spec that it makes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from jaxmoe.errors import UserError, quote
from jaxmoe.interop.bounds import MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS
from jaxmoe.interop.config_json import ConfigReader
from jaxmoe.model.blocks import Mixer
from jaxmoe.model.feed_forward.mlp import MLPSpec
from jaxmoe.model.feed_forward.moe import DenseMoESpec, MoESpec, SharedSpec
from jaxmoe.model.feed_forward.router import Groups, RouterSpec
from jaxmoe.model.mixers.grouped_query import AttentionSpec, QKNorm
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec
from jaxmoe.model.spec import LayerSpec, ModelSpec, group_layers

FeedForward = MLPSpec | MoESpec | DenseMoESpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def check_constants(config: ConfigReader, unread: Mapping[str, Any] = _NOTHING) -> None:
    """Refuse another activation than SiLU, and what transformers' model has no code for.

    Args:
        config: of the model.
        unread: fields of published configs that transformers' model does not read, with what it computes. At any
            other value the model would not be the one that its config describes; null or none is fine.
    """
    config.expect("hidden_act", "silu")
    for name, value in unread.items():
        config.expect(name, value, None)


def rms_norm(config: ConfigReader, kind: Literal["rms", "rms_float32", "rms_centred"] = "rms") -> NormSpec:
    """The norm of ``rms_norm_eps``."""
    return NormSpec(config.number("rms_norm_eps"), kind)


def depth(config: ConfigReader) -> int:
    """The number of layers."""
    return config.size("num_hidden_layers", MAX_LAYERS)


def kinds(config: ConfigReader, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """A field that says of every layer what it is, such as ``layer_types``.

    Raises:
        UserError: not one entry per layer, or one that is not `allowed`.
    """
    value, layers = config.take(name), depth(config)
    if not isinstance(value, list | tuple) or len(value) != layers or not set(value) <= set(allowed):
        raise UserError(
            f"{config.file}: {name} = {quote(value)}: expected {layers} entries, each {' or '.join(map(repr, allowed))}"
        )
    return tuple(value)


def head_dim(config: ConfigReader) -> int:
    """``head_dim`` where the config gives one, else hidden_size / num_attention_heads."""
    if config.take("head_dim", None) is not None:
        return config.size("head_dim")
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if width % heads:
        raise UserError(f"{config.file}: hidden_size {width} is not divisible by num_attention_heads {heads}")
    return width // heads


def attention(
    config: ConfigReader,
    rope: RopeSpec | None,
    biases: str | None = None,
    *,
    head_norm: NormSpec | None = None,
    **options: Any,
) -> AttentionSpec:
    """Grouped-query attention with the heads that the config counts.

    Args:
        config: of the model.
        rope: rotation of queries and keys.
        biases: the field that says whether all four projections have one.
        head_norm: norm of every head's queries and keys.
        options: further fields of the spec.
    """
    if biases is not None:
        options["bias"] = options["output_bias"] = config.take(biases)
    if head_norm is not None:
        options["qk_norm"] = QKNorm(head_norm, "head")
    return AttentionSpec(
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim(config),
        rope=rope,
        **options,
    )


def windows(config: ConfigReader) -> list[int | None]:
    """The window of every layer, from ``layer_types`` and ``sliding_window``."""
    types = kinds(config, "layer_types", ("sliding_attention", "full_attention"))
    config.take("sliding_window", None)  # published configs give one though no layer has it
    return [
        config.size("sliding_window", MAX_POSITIONS) if kind == "sliding_attention" else None
        for kind in types
    ]


def windowed(config: ConfigReader, mixer: AttentionSpec, rotate_full: bool = True) -> list[AttentionSpec]:
    """`mixer` in every layer with that layer's window.

    Args:
        config: with ``layer_types`` and ``sliding_window``.
        mixer: attention of all layers.
        rotate_full: layers without a window have a rotation too.
    """
    full = mixer if rotate_full else dataclasses.replace(mixer, rope=None)
    return [
        full if window is None else dataclasses.replace(mixer, window=window) for window in windows(config)
    ]


def router(
    config: ConfigReader,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    renormalize: bool | None = None,
    weight_dtype: Literal["float32", "model"] = "model",
    **options: Any,
) -> RouterSpec:
    """The highest of a softmax over all experts, unless `options` have another score.

    Args:
        config: of the model.
        num_experts: by default ``num_experts``.
        top_k: by default ``num_experts_per_tok``.
        renormalize: by default ``norm_topk_prob``.
        weight_dtype: of the combine weights.
        options: further fields of the spec.
    """
    count = config.size("num_experts") if num_experts is None else num_experts
    if count * depth(config) > MAX_EXPERTS:
        raise UserError(
            f"{config.file}: found {count:,} experts in each of {depth(config):,} layers: expected at most "
            f"{MAX_EXPERTS:,} in all of them"
        )
    return RouterSpec(
        num_experts=count,
        top_k=config.size("num_experts_per_tok") if top_k is None else top_k,
        renormalize=config.take("norm_topk_prob") if renormalize is None else renormalize,
        weight_dtype=weight_dtype,
        **options,
    )


def grouped_sigmoid_router(
    config: ConfigReader, experts: str = "n_routed_experts", **options: Any
) -> RouterSpec:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2), which many families share.

    Args:
        config: with n_group and topk_group (null where experts are not grouped), norm_topk_prob and
            routed_scaling_factor.
        experts: the field that counts the experts.
        options: further fields of the spec.
    """
    grouped = config.take("n_group", None) is not None or config.take("topk_group", None) is not None
    return router(
        config,
        num_experts=config.size(experts),
        weight_dtype="float32",
        score="sigmoid",
        logits_dtype="float32",
        correction="score",
        groups=Groups(config.size("n_group"), config.size("topk_group"), "top2") if grouped else None,
        sum_offset=1e-20,
        scale=config.number("routed_scaling_factor"),
        **options,
    )


def moe(
    config: ConfigReader, router: RouterSpec, hidden: str = "moe_intermediate_size", **options: Any
) -> MoESpec:
    """Experts behind `router`, of the width that the field `hidden` gives."""
    return MoESpec(router, config.size(hidden), **options)


def shared_expert(hidden: int, bias: bool = False, **options: Any) -> SharedSpec:
    """A feed-forward of that width that every token goes through beside its routed experts."""
    return SharedSpec(MLPSpec(hidden, bias=bias), **options)


def shared_experts(
    config: ConfigReader, count: str, hidden: str = "moe_intermediate_size", bias: bool = False
) -> SharedSpec:
    """As many shared experts as the field `count` says, each as wide as a routed one: one feed-forward."""
    return shared_expert(config.size(hidden) * config.size(count), bias)


def dense(config: ConfigReader, hidden: str = "intermediate_size", bias: bool = False) -> MLPSpec:
    """The feed-forward of layers without experts, of the width that the field `hidden` gives."""
    return MLPSpec(config.size(hidden), bias=bias)


def by_index(
    config: ConfigReader, is_dense: Callable[[int], bool], dense: MLPSpec, sparse: MoESpec
) -> list[FeedForward]:
    """The feed-forward of every layer, counted from 0."""
    return [dense if is_dense(index) else sparse for index in range(depth(config))]


def every_step(config: ConfigReader, step: int, dense: MLPSpec, sparse: MoESpec) -> list[FeedForward]:
    """The feed-forward of every layer: each `step`-th is sparse, unless ``mlp_only_layers`` has it."""
    always_dense = frozenset(config.take("mlp_only_layers", ()))
    return by_index(config, lambda index: index in always_dense or (index + 1) % step != 0, dense, sparse)


def mlp_types(config: ConfigReader) -> tuple[str, ...]:
    """Of every layer "dense" or "sparse", as ``mlp_layer_types`` says."""
    return kinds(config, "mlp_layer_types", ("dense", "sparse"))


def by_type(config: ConfigReader, dense: MLPSpec, sparse: MoESpec) -> list[FeedForward]:
    """The feed-forward of every layer, as ``mlp_layer_types`` says."""
    return [dense if kind == "dense" else sparse for kind in mlp_types(config)]


def model_spec(
    config: ConfigReader,
    mixers: Mixer | Sequence[Mixer],
    ffns: FeedForward | Sequence[FeedForward],
    norm: NormSpec,
    *,
    layer: Mapping[str, Any] | Sequence[Mapping[str, Any]] = _NOTHING,
    **options: Any,
) -> ModelSpec:
    """The model of these layers, with the trunk that most families share.

    Args:
        config: of the model.
        mixers: of every layer, or one that all layers have.
        ffns: likewise.
        norm: of layers and trunk.
        layer: likewise, further fields of its spec.
        options: further fields of the model's spec.
    """
    if not isinstance(mixers, Sequence):
        mixers = [mixers] * depth(config)
    if not isinstance(ffns, Sequence):
        ffns = [ffns] * depth(config)
    if isinstance(layer, Mapping):
        layer = [layer] * depth(config)
    layers = [
        LayerSpec(mixer, ffn, norm, **further)
        for mixer, ffn, further in zip(mixers, ffns, layer, strict=True)
    ]
    return ModelSpec(
        width=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        groups=group_layers(layers),
        norm=norm,
        tie_embeddings=config.take("tie_word_embeddings"),
        init_std=config.number("initializer_range", zero=True),
        **options,
    )
