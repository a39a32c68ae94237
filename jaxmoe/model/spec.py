"""`ModelSpec`: a decoder described by data. Code never asks for a model's name."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxmoe.model.feed_forward.mlp import MLPSpec, mlp_params
from jaxmoe.model.feed_forward.moe import MoESpec, moe_params
from jaxmoe.model.mixers.grouped_query import AttentionSpec, attention_params
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec, norm_params
from jaxmoe.params import Tree, param, stacked


@dataclasses.dataclass(frozen=True)
class DenseMoESpec:
    """A dense feed-forward and experts side by side, their outputs normed apart and added (Gemma 4).

    The dense one sees what the layer's norm gives. The router sees the residual stream itself, and the experts
    a norm of their own of it.

    Attributes:
        norm: of all three further norms: what the dense one gives, what experts see, what they give.
    """

    dense: MLPSpec
    moe: MoESpec
    norm: NormSpec


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A token mixer and a feed-forward around the residual stream x.

    | placement | value |
    |---|---|
    | pre | x + f(norm(x)), for f the mixer and then the feed-forward |
    | post | x + norm(f(x)), for one and then the other |
    | sandwich | x + norm(f(norm(x))), for one and then the other |
    | parallel | x + mixer(norm(x)) + ffn(norm(x)), with one norm |

    Attributes:
        norm: of all norms of the layer.
        residual_scale: factor of what is added to x.
        output_scale: the layer's output is multiplied by a constant that the checkpoint holds.
    """

    mixer: AttentionSpec
    ffn: MoESpec | MLPSpec | DenseMoESpec
    norm: NormSpec
    placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    residual_scale: float = 1.0
    output_scale: bool = False

    @property
    def moe(self) -> MoESpec | None:
        """Its experts; None where the feed-forward is dense."""
        if isinstance(self.ffn, MLPSpec):
            return None
        return self.ffn.moe if isinstance(self.ffn, DenseMoESpec) else self.ffn


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """A pattern of layers repeated; its parameters are stacked over the repeats and run in one scan."""

    pattern: tuple[LayerSpec, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model.

    Attributes:
        width: D, the model width.
        vocab_size: V.
        groups: the layers, in order.
        norm: the final one.
        tie_embeddings: the output head is the embedding.
        init_std: deviation of randomly initialised matrices.
        embedding_scale: factor of the embedded tokens.
        head_bias: a bias on the output head.
        logit_scale: factor of the logits.
        logit_softcap: logits become cap · tanh(logits / cap), after that (Gemma 2, arXiv 2408.00118).
    """

    width: int
    vocab_size: int
    groups: tuple[LayerGroup, ...]
    norm: NormSpec
    tie_embeddings: bool
    init_std: float
    embedding_scale: float = 1.0
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order, groups unrolled."""
        return tuple(layer for group in self.groups for layer in group.pattern * group.repeats)

    @property
    def ropes(self) -> set[RopeSpec]:
        """The distinct rotations of all layers."""
        ropes = {layer.mixer.rope for group in self.groups for layer in group.pattern}
        return {rope for rope in ropes if rope is not None}

    def locate(self, layer: int) -> tuple[int, int, int]:
        """Group, place in its pattern and repeat of layer number `layer`."""
        first = 0
        for index, group in enumerate(self.groups):
            repeat, place = divmod(layer - first, len(group.pattern))
            if repeat < group.repeats:
                return index, place, repeat
            first += len(group.pattern) * group.repeats
        raise IndexError(f"layer {layer} past the last of {len(self.layers)}")


def group_layers(layers: Sequence[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Write a list of layers as repeated patterns, longest coverage first, so that each scan is long.

    Three dense layers and 58 sparse ones become [dense] x 3, [sparse] x 58; an alternation of a and b becomes
    [a, b] x n.
    """
    groups: list[LayerGroup] = []
    start = 0
    while start < len(layers):
        best_period, best_repeats = 1, 1
        for period in range(1, (len(layers) - start) // 2 + 1):
            repeats = 1
            while (
                layers[start : start + period]
                == layers[start + repeats * period : start + (repeats + 1) * period]
            ):
                repeats += 1
            if repeats > 1 and period * repeats > best_period * best_repeats:
                best_period, best_repeats = period, repeats
        groups.append(LayerGroup(tuple(layers[start : start + best_period]), best_repeats))
        start += best_period * best_repeats
    return tuple(groups)


def layer_params(layer: LayerSpec, width: int) -> Tree:
    """Declarations of one layer, not stacked."""
    tree: dict[str, Any] = {"attention": attention_params(layer.mixer, width)}
    norms = {
        "pre": ("attention_norm", "ffn_norm"),
        "post": ("attention_post_norm", "ffn_post_norm"),
        "sandwich": ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"),
        "parallel": ("attention_norm",),
    }[layer.placement]
    for name in norms:
        tree |= norm_params(name, layer.norm, width)
    if isinstance(layer.ffn, DenseMoESpec):
        for name in ("dense_post_norm", "experts_norm", "experts_post_norm"):
            tree |= norm_params(name, layer.ffn.norm, width)
        tree["mlp"] = mlp_params(layer.ffn.dense, width)
    elif isinstance(layer.ffn, MLPSpec):
        tree["mlp"] = mlp_params(layer.ffn, width)
    if layer.moe is not None:
        tree |= moe_params(layer.moe, width)
    if layer.output_scale:
        tree["output_scale"] = param("J", {"J": 1}, role="constant", init="ones")
    return tree


def model_params(spec: ModelSpec) -> Tree:
    """Declarations of a whole model: {"embed", "groups": (group: (place in pattern: layer))), "norm", "lm_head"}."""
    sizes = {"V": spec.vocab_size, "D": spec.width}
    tree: dict[str, Any] = {
        "embed": param("VD", sizes, role="embedding"),
        "groups": tuple(
            tuple(stacked(layer_params(layer, spec.width), group.repeats) for layer in group.pattern)
            for group in spec.groups
        ),
    } | norm_params("norm", spec.norm, spec.width)
    if not spec.tie_embeddings:
        tree["lm_head"] = param("VD", sizes, role="embedding")
    if spec.head_bias:
        tree["lm_head_bias"] = param("V", sizes, role="vector", init="zeros")
    return tree
