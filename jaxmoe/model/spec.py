"""`ModelSpec`: a decoder described by data. Code never asks for a model's name."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxmoe.model.blocks import FeedForward, Mixer
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.norms import NormSpec, norm_params
from jaxmoe.params import Tree, param, stacked

Placement = Literal["pre", "post", "sandwich", "parallel", "normed"]

_BEFORE = ("pre", "sandwich", "parallel", "normed")
_AFTER = ("post", "sandwich")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A token mixer and a feed-forward around the residual stream x.

    | placement | value |
    |---|---|
    | pre | x + f(norm(x)), for f the mixer and then the feed-forward |
    | post | x + norm(f(x)), for one and then the other |
    | sandwich | x + norm(f(norm(x))), for one and then the other |
    | parallel | x + mixer(norm(x)) + ffn(norm(x)), with one norm |
    | normed | norm(x) + f(norm(x)), for one and then the other |

    Attributes:
        mixer: None in a layer that is a feed-forward alone.
        ffn: None in a layer that is a mixer alone.
        norm: of all norms of the layer.
        norms_before: of what the mixer and the feed-forward see, where these are others.
        mixer_scales: factors in the sum around the mixer: of x (or norm(x)), and of what f gives.
        ffn_scales: the same around the feed-forward.
        output_scale: the layer's output is multiplied by a constant that the checkpoint holds.
    """

    mixer: Mixer | None
    ffn: FeedForward | None
    norm: NormSpec
    placement: Placement = "pre"
    mixer_scales: tuple[float, float] = (1.0, 1.0)
    ffn_scales: tuple[float, float] = (1.0, 1.0)
    output_scale: bool = False
    norms_before: tuple[NormSpec, NormSpec] | None = None

    @property
    def blocks(self) -> tuple[Mixer | FeedForward, ...]:
        """The mixer and the feed-forward, as far as they are there."""
        return tuple(block for block in (self.mixer, self.ffn) if block is not None)

    @property
    def normed_before(self) -> bool:
        """Whether f sees norm(x)."""
        return self.placement in _BEFORE

    def norm_before(self, name: str) -> NormSpec:
        """Of what the "attention", that is the mixer, or the "ffn" sees."""
        return self.norm if self.norms_before is None else self.norms_before[name == "ffn"]

    @property
    def normed_after(self) -> bool:
        """Whether what f gives is normed."""
        return self.placement in _AFTER

    @property
    def from_normed(self) -> bool:
        """Whether norm(x) takes the place of x."""
        return self.placement == "normed"

    @property
    def one_norm(self) -> bool:
        """Whether mixer and feed-forward see the same norm(x)."""
        return self.placement == "parallel"

    def params(self, width: int) -> Tree:
        """Declarations of one layer, not stacked."""
        tree: dict[str, Any] = {}
        for block in self.blocks:
            tree |= block.params(width)
        named = (("attention", self.mixer is not None), ("ffn", self.ffn is not None))
        present = [name for name, is_there in named if is_there]
        if self.normed_before:
            for name in present[:1] if self.one_norm else present:
                tree |= norm_params(f"{name}_norm", self.norm_before(name), width)
        if self.normed_after:
            for name in present:
                tree |= norm_params(f"{name}_post_norm", self.norm, width)
        if self.output_scale:
            tree["output_scale"] = param("J", {"J": 1}, role="constant", init="ones")
        return tree

    def problems(self) -> Iterator[str]:
        """What contradicts itself, in the words of config.json."""
        if not self.blocks:
            yield "a layer has neither a token mixer nor a feed-forward"
        for block in self.blocks:
            yield from block.problems()

    def describe(self) -> str:
        """What it is made of, in a line."""
        return "; ".join(block.describe() for block in self.blocks)

    def traits(self) -> Iterator[str]:
        """What of the layer itself is not the plainest."""
        told = {
            "norms after": self.placement == "post",
            "norms before and after": self.placement == "sandwich",
            "attention beside feed-forward": self.placement == "parallel",
            "residuals from the norm": self.placement == "normed",
            "scaled residuals": (self.mixer_scales, self.ffn_scales) != ((1.0, 1.0),) * 2,
            "layer scale": self.output_scale,
            "LayerNorm": self.norm.kind == "layer",
            "gated norms": any(norm.gate is not None for norm in self.norms_before or ()),
        }
        yield from (text for text, holds in told.items() if holds)


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
    def rotations(self) -> frozenset[RopeSpec]:
        """The distinct rotations of all layers."""
        mixers = {layer.mixer for group in self.groups for layer in group.pattern if layer.mixer is not None}
        return frozenset(rope for mixer in mixers for rope in mixer.rotations())

    @functools.cached_property
    def declared(self) -> Tree:
        """Declarations of all parameters: {"embed", "groups": (group: (place: layer)), "norm", "lm_head"}."""
        sizes = {"V": self.vocab_size, "D": self.width}
        tree: dict[str, Any] = {
            "embed": param("VD", sizes, role="embedding"),
            "groups": tuple(
                tuple(stacked(layer.params(self.width), group.repeats) for layer in group.pattern)
                for group in self.groups
            ),
        } | norm_params("norm", self.norm, self.width)
        if not self.tie_embeddings:
            tree["lm_head"] = param("VD", sizes, role="embedding")
        if self.head_bias:
            tree["lm_head_bias"] = param("V", sizes, role="vector", init="zeros")
        return tree

    def locate(self, layer: int) -> tuple[int, int, int]:
        """Group, place in its pattern and repeat of layer number `layer`."""
        first = 0
        for index, group in enumerate(self.groups):
            repeat, place = divmod(layer - first, len(group.pattern))
            if repeat < group.repeats:
                return index, place, repeat
            first += len(group.pattern) * group.repeats
        raise IndexError(f"layer {layer} past the last of {len(self.layers)}")

    def problems(self) -> Iterator[str]:
        """What contradicts itself, in the words of config.json."""
        for layer in dict.fromkeys(layer for group in self.groups for layer in group.pattern):
            yield from layer.problems()

    def traits(self) -> Iterator[str]:
        """What of embedding and head is not the plainest."""
        told = {
            "tied": self.tie_embeddings,
            "scaled embedding": self.embedding_scale != 1.0,
            "scaled logits": self.logit_scale != 1.0,
            "logit softcap": self.logit_softcap is not None,
            "head bias": self.head_bias,
        }
        yield from (text for text, holds in told.items() if holds)


def group_layers(layers: Sequence[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Write a list of layers as repeated patterns: three dense layers and 58 sparse ones become [dense] x 3,
    [sparse] x 58."""
    return tuple(LayerGroup(pattern, repeats) for pattern, repeats in repeated(layers))


def repeated(items: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Write a list as patterns and how often each is repeated, longest coverage first, so that each scan is long.

    An alternation of a and b becomes (a, b), n.
    """
    start = 0
    while start < len(items):
        best_period, best_repeats = 1, 1
        for period in range(1, (len(items) - start) // 2 + 1):
            repeats = 1
            while (
                items[start : start + period]
                == items[start + repeats * period : start + (repeats + 1) * period]
            ):
                repeats += 1
            if repeats > 1 and period * repeats > best_period * best_repeats:
                best_period, best_repeats = period, repeats
        yield tuple(items[start : start + best_period]), best_repeats
        start += best_period * best_repeats
