"""A model as PEFT sees it: modules by name, what each is, and the parameters that it holds itself."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

Kind = Literal["linear", "sealed", "embedding", "router", "convolution", "other"]
"""What a module is: a linear layer; one that PEFT refuses to adapt or adapts in vain, as transformers' code reads its
weight and does not call it; an embedding; a router, which is a linear layer in some models and a module with a
parameter of its own in others; a convolution; or anything else, such as a norm or the experts of a layer."""


@dataclasses.dataclass(frozen=True)
class Module:
    """One module that has parameters of its own.

    Attributes:
        name: in transformers' model, such as "model.layers.0.self_attn.q_proj".
        kind: what it is.
        parameters: shape of each of its own parameters by name, in the order in which they are registered.
        transposed: its 3-D parameters are (E, in, out) instead of (E, out, in).
        aside: it belongs to a tower of another modality.
    """

    name: str
    kind: Kind
    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool = False
    aside: bool = False

    def full(self, parameter: str) -> str:
        """A parameter's name in the model."""
        return f"{self.name}.{parameter}"

    def stored_transposed(self, parameter: str) -> bool:
        """Whether a parameter has its inputs before its outputs. Those of an embedding are its rows, the tokens."""
        return self.kind == "embedding" or (self.transposed and len(self.parameters[parameter]) == 3)

    def sizes(self, parameter: str) -> tuple[int, int]:
        """(out, in) of a parameter of two or three axes."""
        first, second = self.parameters[parameter][-2:]
        return (second, first) if self.stored_transposed(parameter) else (first, second)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A linear layer of transformers 4 that is a part of a parameter today.

    Attributes:
        parameter: of today's model, such as "model.layers.0.mlp.experts.gate_up_proj".
        expert: its place on the first axis; None where it is the parameter under another name.
        rows: of the parameter's outputs, those that are its own.
    """

    parameter: str
    expert: int | None
    rows: range

    def module(self, name: str, holder: Module, parameter: str) -> Module:
        """The layer, which is called `name`.

        Args:
            name: of the layer.
            holder: today's module that it is a part of.
            parameter: that it is a part of, by its name within that.
        """
        if self.expert is None:
            return Module(name, holder.kind, {"weight": holder.parameters[parameter]})
        return Module(name, "linear", {"weight": (len(self.rows), holder.sizes(parameter)[1])})


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A model.

    Attributes:
        modules: those with parameters, in transformers' order.
        head: name of the output head's module; None where it has no weight of its own.
        pieces: linear layers of transformers 4 by their name, such as "model.layers.0.mlp.experts.3.up_proj".
        whole: transformers' model has no other modules; else towers may have some of the same endings.
    """

    modules: tuple[Module, ...]
    head: str | None = None
    pieces: Mapping[str, Piece] = dataclasses.field(default_factory=dict)
    whole: bool = True

    @property
    def by_name(self) -> dict[str, Module]:
        """The modules by name."""
        return {module.name: module for module in self.modules}

    def parameters(self) -> Iterator[tuple[Module, str]]:
        """Every parameter: its module, and its name within that."""
        for module in self.modules:
            for parameter in module.parameters:
                yield module, parameter

    def in_pieces(self) -> "Anatomy":
        """The model as transformers 4 had it: each of `pieces` a linear layer, and not what they became."""
        became = {piece.parameter for piece in self.pieces.values()}
        holders: dict[str, tuple[Module, str]] = {}
        kept = []
        for module in self.modules:
            holders |= {module.full(name): (module, name) for name in module.parameters}
            left = {n: shape for n, shape in module.parameters.items() if module.full(n) not in became}
            if left:
                kept.append(dataclasses.replace(module, parameters=left))
        former = [piece.module(name, *holders[piece.parameter]) for name, piece in self.pieces.items()]
        return dataclasses.replace(self, modules=(*kept, *former))
