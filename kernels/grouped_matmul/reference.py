"""What a grouped matmul means, in plain jnp. Every other backend is tested against this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:  # not needed to run, and not everywhere where kernels are measured
    from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "R D"], weights: Float[Array, "E F D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """See `jaxmoe.kernels.grouped_matmul.grouped_matmul`. Costs E dense matmuls, and holds
    (E, R, D) and (E, R, F).

    Both sides of the product are masked, not only one: 0 * nan is nan, and each mask is what keeps garbage in
    rows of no group, or of another group, out of one of the two gradients.
    """
    ends_E = jnp.cumsum(group_sizes)
    row_R = jnp.arange(x.shape[0])
    member_ER = (row_R[None, :] >= (ends_E - group_sizes)[:, None]) & (row_R[None, :] < ends_E[:, None])
    x_ERD = jnp.where(member_ER[:, :, None], x[None, :, :], 0)
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    y_ERF = jnp.einsum("erd,efd->erf", x_ERD, weights, preferred_element_type=accumulator)
    return jnp.where(member_ER[:, :, None], y_ERF, 0).sum(axis=0).astype(x.dtype)
