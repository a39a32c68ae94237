"""`ModelSpec`: a decoder described by data. Code never asks for a model's name."""

import dataclasses
from collections.abc import Sequence

from jaxmoe.model.attention import AttentionSpec, attention_params
from jaxmoe.model.mlp import MLPSpec, mlp_params
from jaxmoe.model.moe import MoESpec, moe_params
from jaxmoe.model.rope import RopeSpec
from jaxmoe.params import Param, Tree, param, stacked


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One pre-norm layer: x + mixer(norm(x)), then x + ffn(norm(x))."""

    mixer: AttentionSpec
    ffn: MoESpec | MLPSpec
    norm_eps: float


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
        norm_eps: of the final norm.
        tie_embeddings: the output head is the embedding.
        init_std: deviation of randomly initialised matrices.
    """

    width: int
    vocab_size: int
    groups: tuple[LayerGroup, ...]
    norm_eps: float
    tie_embeddings: bool
    init_std: float

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order, groups unrolled."""
        return tuple(layer for group in self.groups for layer in group.pattern * group.repeats)

    @property
    def ropes(self) -> set[RopeSpec]:
        """The distinct rotations of all layers."""
        return {layer.mixer.rope for group in self.groups for layer in group.pattern}

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
    norm: Param = param("D", {"D": width}, role="vector", init="ones")
    ffn = (
        moe_params(layer.ffn, width)
        if isinstance(layer.ffn, MoESpec)
        else {"mlp": mlp_params(layer.ffn, width)}
    )
    return {"attention_norm": norm, "attention": attention_params(layer.mixer, width), "ffn_norm": norm} | ffn


def model_params(spec: ModelSpec) -> Tree:
    """Declarations of a whole model: {"embed", "groups": (group: (place in pattern: layer))), "norm", "lm_head"}."""
    sizes = {"V": spec.vocab_size, "D": spec.width}
    tree = {
        "embed": param("VD", sizes, role="embedding"),
        "groups": tuple(
            tuple(stacked(layer_params(layer, spec.width), group.repeats) for layer in group.pattern)
            for group in spec.groups
        ),
        "norm": param("D", sizes, role="vector", init="ones"),
    }
    if not spec.tie_embeddings:
        tree["lm_head"] = param("VD", sizes, role="embedding")
    return tree
