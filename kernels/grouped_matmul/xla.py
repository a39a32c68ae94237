"""Grouped matmul from plain XLA operations: runs everywhere, and is made to be fast on CPUs.

A loop over the experts that have rows, and inside it loops over row blocks with one dense dot each. Nothing
is gathered or padded: a block that runs past its group's end is blended into the output under a mask.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.tiles import RowBlocks, choose_row_blocks

Carry = TypeVar("Carry")


Pair = tuple[jax.Array, jax.Array]


def matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool, plus: Pair | None = None
) -> jax.Array:
    """out[z] = weights[g(z)] @ x[z], or weights[g(z)].T @ x[z] with `transpose`; rows of no group are zero.

    Args:
        x: (Z, c) rows sorted by group: the first group_sizes[0] rows belong to group 0, and so on; (Z, n) with
            `transpose`.
        weights: (E, n, c).
        group_sizes: (E,) int32, none negative. They may sum to less than Z: the rows after them belong to no group and
            may hold anything (nan too). Sizes that go past Z are cut there.
        transpose: contract over n instead of c, as the gradient of x needs it.
        plus: another x and weights, whose product is added while a block of the output is at hand.

    Returns:
        (Z, n), or (Z, c) with `transpose`, in x's dtype.
    """
    blocks = choose_row_blocks(x.shape[0], weights.shape[0])
    pairs = ((x, weights),) if plus is None else ((x, weights), plus)
    return _matmul(pairs, group_sizes, transpose=transpose, blocks=blocks)


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """dweights[e] = sum of the outer products dy[z] x[z] over the rows z of group e; zero for an empty group.

    Args:
        x: (Z, c).
        dy: (Z, n).
        group_sizes: (E,) int32.

    Returns:
        (E, n, c) in x's dtype.
    """
    return _weight_gradient(x, dy, group_sizes, blocks=choose_row_blocks(x.shape[0], group_sizes.shape[0]))


@partial(jax.jit, static_argnames=("transpose", "blocks"))
def _matmul(
    pairs: tuple[Pair, ...], group_sizes: jax.Array, *, transpose: bool, blocks: RowBlocks
) -> jax.Array:
    x, first_weights = pairs[0]
    rows = x.shape[0]
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    contraction = (((1,), (0 if transpose else 1,)), ((), ()))

    def add_group(expert: jax.Array, start: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        own = [lax.dynamic_index_in_dim(weights, expert, keepdims=False) for _, weights in pairs]

        def add_block(out: jax.Array, position: jax.Array, size: int) -> jax.Array:
            offset, inside = _place_block(position, end, size, rows)
            blocks_of_x = [lax.dynamic_slice_in_dim(x, offset, size) for x, _ in pairs]
            products = (
                lax.dot_general(block, weight, contraction, preferred_element_type=accumulator)
                for block, weight in zip(blocks_of_x, own, strict=True)
            )
            y = functools.reduce(jnp.add, products)
            old = lax.dynamic_slice_in_dim(out, offset, size)
            return lax.dynamic_update_slice_in_dim(
                out, jnp.where(inside, y.astype(out.dtype), old), offset, axis=0
            )

        return _fold_blocks(add_block, out, start, end, blocks)

    # zeros_like also takes over the mesh axes that x varies over inside shard_map: a loop's carry must.
    out = jnp.zeros_like(x, shape=(rows, first_weights.shape[2 if transpose else 1]))
    return _fold_groups(add_group, out, group_sizes)


@partial(jax.jit, static_argnames=("blocks",))
def _weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, blocks: RowBlocks) -> jax.Array:
    rows, shape = x.shape[0], (dy.shape[1], x.shape[1])
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def add_group(expert: jax.Array, start: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        def add_block(total: jax.Array, position: jax.Array, size: int) -> jax.Array:
            offset, inside = _place_block(position, end, size, rows)
            # Both operands: 0 * nan is nan, and rows past the group may hold anything.
            dy_block = jnp.where(inside, lax.dynamic_slice_in_dim(dy, offset, size), 0)
            x_block = jnp.where(inside, lax.dynamic_slice_in_dim(x, offset, size), 0)
            contraction = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(dy_block, x_block, contraction, preferred_element_type=accumulator)

        zeros = jnp.zeros_like(x, shape=shape, dtype=accumulator)
        total = _fold_blocks(add_block, zeros, start, end, blocks)
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, axis=0)

    out = jnp.zeros_like(x, shape=(group_sizes.shape[0], *shape))
    return _fold_groups(add_group, out, group_sizes)


def _fold_groups(
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


def _fold_blocks(
    add_block: Callable[[Carry, jax.Array, int], Carry],
    carry: Carry,
    start: jax.Array,
    end: jax.Array,
    blocks: RowBlocks,
) -> Carry:
    """Fold `carry = add_block(carry, position, size)` over blocks covering the rows from `start` to `end`."""
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
            return add_block(carry, position, size), position + size

        state = lax.fori_loop(0, counts[size], step, state)
    return state[0]


def _place_block(position: jax.Array, end: jax.Array, size: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Where a block of `size` rows for `position` begins, and which of its rows, (size, 1) bool, it is for.

    At the end of the array the block begins before `position`, so that it stays inside.
    """
    offset = jnp.minimum(position, rows - size)
    row = offset + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return offset, (row >= position) & (row < end)
