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

    A group takes as many blocks of the largest size as it fills, then of the next, and so on; the last one runs past
    the group by less than the smallest size. Every size is one more copy of the loop's body to compile.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = list(self.sizes) == sorted(set(self.sizes))
        if any(size <= 0 or size % self.sizes[0] for size in self.sizes) or not ascending:
            raise ValueError(
                f"row-block sizes are {self.sizes}; expected positive and strictly ascending multiples of the first"
            )

    @property
    def padding(self) -> int:
        """Rows that the last block may run past the end."""
        return self.sizes[0] - 1 if self.sizes else 0


# Measured on two cores of a CPU with AVX-512. A block of fewer than 32 rows costs as much as one of 32 when
# the weights have to come from memory; 8 pays where most groups hold a few rows. Above 256 nothing is gained.
_MANY_ROWS = (32, 64, 128, 256)
_FEW_ROWS = (8, 32, 64, 128)


def choose_row_blocks(rows: int, groups: int) -> RowBlocks:
    """Blocks for `rows` rows in `groups` groups; there is none for 0, and but for the first none is larger than `rows`.

    Group sizes are known only at run time, so the choice goes by their mean.
    """
    if rows == 0:
        return RowBlocks(())
    first, *larger = _MANY_ROWS if rows >= _MANY_ROWS[-1] * groups else _FEW_ROWS
    return RowBlocks((first, *(size for size in larger if size <= rows)))


class Block(NamedTuple):
    """Consecutive slots, of which the last may belong to other experts, or to nobody past the end.

    Attributes:
        offset: () int32, the first slot.
        inside: (b, 1) bool, the block's own rows.
    """

    offset: jax.Array
    inside: jax.Array

    def rows(self, x_S: jax.Array) -> jax.Array:
        """Those of the block, (b, …) of (S, …)."""
        return lax.dynamic_slice_in_dim(x_S, self.offset, self.inside.shape[0])

    def put(self, x_S: jax.Array, rows_b: jax.Array) -> jax.Array:
        """x with the block's rows replaced; those that are not its own have to be written later, or never read."""
        return lax.dynamic_update_slice_in_dim(x_S, rows_b.astype(x_S.dtype), self.offset, axis=0)


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
    blocks: RowBlocks,
) -> Carry:
    """Fold `carry = add_block(carry, block)` over blocks covering the rows from `start` to `end`, in their order."""
    if not blocks.sizes:
        return carry
    smallest = blocks.sizes[0]
    left = -(-(end - start) // smallest) * smallest
    # The position is carried, not computed from the counter: a body that does not depend on its state is
    # invariant, and XLA hoists the dot out of its loop, where it runs for every size even if the count is 0.
    state = (carry, start)
    for size in reversed(blocks.sizes):

        def step(_: jax.Array, state: tuple[Carry, jax.Array], size: int = size) -> tuple[Carry, jax.Array]:
            carry, position = state
            row = position + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
            return add_block(carry, Block(position, row < end)), position + size

        state = lax.fori_loop(0, left // size, step, state)
        left %= size
    return state[0]
