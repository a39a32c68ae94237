"""The arrays of the experts of one layer. Dimension letters are those of `jaxmoe.kernels`."""

from typing import Any, NamedTuple

from jaxmoe.codecs import PACKED, FourBit, unpack

Leaf = Any
"""An array; or what stands for one: its gradient, its shape, or whether its gradient is wanted."""


class Lora(NamedTuple):
    """Low-rank updates of the experts (Hu et al., arXiv 2106.09685): W + scale · B A, never formed.

    A pair is None where a matrix has no update. The scale belongs to the call.

    Attributes:
        gate_up_a: (E, r, D).
        gate_up_b: (E, G, F, r).
        down_a: (E, r, F).
        down_b: (E, D, r).
    """

    gate_up_a: Leaf = None
    gate_up_b: Leaf = None
    down_a: Leaf = None
    down_b: Leaf = None


class Experts(NamedTuple):
    """Parameters of the experts held here, all in the dtype of the activations.

    Both matrices may be packed in few bits (`jaxmoe.codecs`), one tensor for each expert; then they have no gradient.

    Attributes:
        gate_up: (E, G, F, D).
        down: (E, D, F).
        gate_up_bias: (E, G, F) or None.
        down_bias: (E, D) or None.
        lora: low-rank updates.
    """

    gate_up: Leaf
    down: Leaf
    gate_up_bias: Leaf = None
    down_bias: Leaf = None
    lora: Lora = Lora()


def is_packed(weight: Any) -> bool:
    """Whether a matrix is packed in few bits."""
    return isinstance(weight, PACKED)


def shape_of(weight: Any) -> tuple[int, ...]:
    """Of all experts' matrices, packed or not."""
    if isinstance(weight, FourBit):
        return (*weight.stack, *weight.shape)
    return weight.codes.shape if is_packed(weight) else weight.shape


def unpacked(experts: Experts, dtype: Any) -> Experts:
    """With both matrices as arrays."""
    wide = lambda weight: unpack(weight, dtype) if is_packed(weight) else weight
    return experts._replace(gate_up=wide(experts.gate_up), down=wide(experts.down))
