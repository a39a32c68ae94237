"""The arrays of the experts of one layer.

Letters: R tokens, K experts per token, Z = R*K slots, D width, E experts held, G parts of the first matrix (gate and
up, or up alone), F hidden width of an expert, r rank of LoRA.
"""

from typing import NamedTuple

import jax


class Lora(NamedTuple):
    """Low-rank updates of the experts (Hu et al., arXiv 2106.09685): W + scale · B A, never formed.

    A pair is None where a matrix has no update. The scale belongs to the call.

    Attributes:
        gate_up_a: (E, r, D).
        gate_up_b: (E, G, F, r).
        down_a: (E, r, F).
        down_b: (E, D, r).
    """

    gate_up_a: jax.Array | None = None
    gate_up_b: jax.Array | None = None
    down_a: jax.Array | None = None
    down_b: jax.Array | None = None


class Experts(NamedTuple):
    """Parameters of the experts held here, all in the dtype of the activations.

    Attributes:
        gate_up: (E, G, F, D).
        down: (E, D, F).
        gate_up_bias: (E, G, F) or None.
        down_bias: (E, D) or None.
        lora: low-rank updates.
    """

    gate_up: jax.Array
    down: jax.Array
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    lora: Lora = Lora()
