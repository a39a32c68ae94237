"""What is done for a few queries at once, where that of all of them with every key would not fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

QUERIES = 64
"""Queries whose scores are there at once: those of a long text with all of its keys would be gigabytes."""


def by_query_blocks(function: Callable[..., Any], *of_queries: jax.Array | None) -> Any:
    """`function` of arrays (B, T, …), one block of `QUERIES` after the other, the last one filled with its last query.

    Args:
        function: of parts (B, C, …) of the arrays; gives an array (B, C, …), or a tree of them.
        of_queries: the arrays; one that is None stays None.

    Returns:
        What it gives, (B, T, …).
    """
    length = next(x.shape[1] for x in of_queries if x is not None)
    if length <= QUERIES:
        return function(*of_queries)
    missing = -length % QUERIES

    def apart(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]), 1, 0)

    def together(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    parts = jax.tree.map(apart, of_queries)
    return jax.tree.map(together, jax.lax.map(lambda part: function(*part), parts))
