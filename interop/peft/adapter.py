"""An adapter as what it means: low-rank pairs on a model's parameters, and parameters replaced as a whole."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to one parameter: the scaled product of B and A.

    Attributes:
        name: of the parameter in transformers' model, such as "model.layers.0.mlp.experts.gate_up_proj".
        a: (r, in), or (E, r, in) of experts.
        b: (out, r), or (E, out, r).
        scale: the factor on B A.
        magnitude: of DoRA, the length of each output's weights: (out,), or (E, out).
        transposed: the parameter has its inputs first: (in, out), or (E, in, out).
        wrapped: PEFT adds it to a bare parameter or an embedding; what follows for rounding is in `merging`.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    transposed: bool = False
    wrapped: bool = False

    @property
    def rank(self) -> int:
        """The width between B and A, per expert."""
        return self.a.shape[-2]

    def of_expert(self, expert: int) -> "LowRank":
        """What is added to one expert, without the axis of experts."""
        magnitude = None if self.magnitude is None else self.magnitude[expert]
        return dataclasses.replace(self, a=self.a[expert], b=self.b[expert], magnitude=magnitude)

    def delta(self) -> np.ndarray:
        """scale · B A in float32, oriented as the parameter. With DoRA, what is added before the lengths are set."""
        product = self.b.astype(np.float32) @ self.a.astype(np.float32)
        product *= np.float32(self.scale)
        return np.swapaxes(product, -1, -2) if self.transposed else product


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Attributes:
        pairs: by the parameter's name.
        saved: parameters that it replaces, by name; a pair on the same parameter comes on top.
        base: path or hub id of the model that it was trained on, where known.
        dropout: share of the inputs of A that training sets to zero.
    """

    pairs: Mapping[str, LowRank]
    saved: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base: str | None = None
    dropout: float = 0.0
