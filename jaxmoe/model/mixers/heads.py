"""From the heads of attention back to the model width."""

import functools

import jax
from jaxtyping import Array, Float

from jaxmoe.model.linear import Weight, linear


@functools.partial(jax.checkpoint, prevent_cse=False)
def project_heads(
    out_BTNV: Float[Array, "B T N values"], weight: Weight, bias: Float[Array, "D"] | None
) -> Float[Array, "B T D"]:
    """What heads give (B, T, N, value width) → (B, T, D), by a weight "DP".

    The heads are kept once for the backward passes of attention and of the product, in one shape.
    """
    return linear(out_BTNV.reshape(*out_BTNV.shape[:2], -1), weight, bias)
