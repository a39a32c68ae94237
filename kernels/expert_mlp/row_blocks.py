"""Blocks of the rows of an expert, for the portable backend: how large, and loops over them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class RowBlocks:
    """Sizes of the row blocks that a group is cut into, ascending.

    A group takes as many blocks of the largest size as it fills, then one block of the smallest size that
    holds its remainder. The waste per group is below half of that last block, where neighbours differ by a
    factor of two; every size is one more dot to compile.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(size <= 0 for size in self.sizes) or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"row-block sizes are {self.sizes}; expected positive and strictly ascending")


# Measured on two cores of a CPU with AVX-512. A block of fewer than 32 rows costs as much as one of 32 when
# the weights have to come from memory; 8 pays where most groups hold a few rows. Above 256 nothing is gained.
_MANY_ROWS = (32, 64, 128, 256)
_FEW_ROWS = (8, 32, 64, 128)


def choose_row_blocks(rows: int, groups: int) -> RowBlocks:
    """Blocks for `rows` rows in `groups` groups; none is larger than `rows`, so that there is none for 0.

    Group sizes are known only at run time, so the choice goes by their mean.
    """
    ladder = _MANY_ROWS if rows >= _MANY_ROWS[-1] * groups else _FEW_ROWS
    return RowBlocks(tuple(sorted({min(size, rows) for size in ladder if rows > 0})))


class Block(NamedTuple):
    """Consecutive slots, of which some may belong to other experts.

    Attributes:
        offset: () int32, the first slot.
        inside: (b, 1) bool, the block's own rows.
    """

    offset: jax.Array
    inside: jax.Array

    def rows(self, x_Z: jax.Array) -> jax.Array:
        """Those of the block, (b, …) of (Z, …)."""
        return lax.dynamic_slice_in_dim(x_Z, self.offset, self.inside.shape[0])

    def put(self, x_Z: jax.Array, rows_b: jax.Array) -> jax.Array:
        """x with the block's own rows replaced."""
        inside = self.inside if rows_b.ndim > 1 else self.inside[:, 0]
        new = jnp.where(inside, rows_b.astype(x_Z.dtype), self.rows(x_Z))
        return lax.dynamic_update_slice_in_dim(x_Z, new, self.offset, axis=0)


def fold_groups(
    add_group: Callable[[jax.Array, jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
    group_sizes: jax.Array,
) -> Carry:
    """Fold `carry = add_group(expert, start, end, carry)` over the groups that have rows."""
    edges = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = edges - group_sizes
    # An expert without rows is not visited, so that its weights are not even read.
    visit = jnp.argsort(group_sizes == 0, stable=True).astype(jnp.int32)

    def step(index: jax.Array, carry: Carry) -> Carry:
        expert = visit[index]
        return add_group(expert, starts[expert], edges[expert], carry)

    return lax.fori_loop(0, jnp.sum(group_sizes != 0, dtype=jnp.int32), step, carry)


def fold_blocks(
    add_block: Callable[[Carry, Block], Carry],
    carry: Carry,
    start: jax.Array,
    end: jax.Array,
    rows: int,
    blocks: RowBlocks,
) -> Carry:
    """Fold `carry = add_block(carry, block)` over blocks covering the rows from `start` to `end`, of `rows` in all."""
    largest = max(blocks.sizes, default=1)
    full, remainder = (end - start) // largest, (end - start) % largest
    smaller = 0
    counts = {}
    for size in blocks.sizes:
        counts[size] = ((remainder > smaller) & (remainder <= size)).astype(jnp.int32)
        smaller = size
    counts[largest] = full + counts.get(largest, 0)

    # The position is carried, not computed from the counter: a body that does not depend on its state is
    # invariant, and XLA hoists the dot out of its loop, where it runs for every size even if the count is 0.
    state = (carry, start)
    for size in reversed(blocks.sizes):

        def step(_: jax.Array, state: tuple[Carry, jax.Array], size: int = size) -> tuple[Carry, jax.Array]:
            carry, position = state
            return add_block(carry, _place(position, end, size, rows)), position + size

        state = lax.fori_loop(0, counts[size], step, state)
    return state[0]


def _place(position: jax.Array, end: jax.Array, size: int, rows: int) -> Block:
    """The block of `size` rows for `position`; at the end of the array it begins before, so that it stays inside."""
    offset = jnp.minimum(position, rows - size)
    row = offset + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return Block(offset, (row >= position) & (row < end))
