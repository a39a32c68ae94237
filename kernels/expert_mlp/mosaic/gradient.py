"""Weight gradients on Hopper: for each expert, the sum of the outer products of its slots' rows.

One persistent kernel, a producer and consumers as in `mosaic.matmul`; the contraction runs over the slots of an
expert, which are whole tiles. Padding adds nothing because one operand is zero there; an expert without slots makes
no step, and its accumulator, which begins at zero, is stored as it is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.kernels.expert_mlp.mosaic.geometry import WARPGROUP_ROWS
from jaxmoe.kernels.expert_mlp.mosaic.matmul import (
    PRODUCER_REGISTERS,
    Ring,
    StorePieces,
    check_stages,
    consumer_registers,
    store_chunk,
)
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB, TILED, await_rows, issue_rows
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots
from jaxmoe.kernels.expert_mlp.mosaic.tiles import LAG, GradientTiles


@dataclasses.dataclass(frozen=True)
class Side:
    """One operand: (R, …) whose rows are gathered by token, or (p, …) in slot order."""

    rows: jax.Array
    gathered: bool


def weight_gradient(
    out: Side,
    columns: Side,
    slots: Slots,
    tiles: GradientTiles,
    *,
    tile_rows: int,
    multiprocessors: int,
    interpret: Any = None,
) -> jax.Array:
    """dweights[e] = Σ over the slots of e of out[slot]ᵀ columns[slot]: (E, n, c) in the operands' dtype.

    Args:
        out: n columns, the gradient of the product (or what is zero for padding, on either side).
        columns: c columns, the left operand of the product.
        slots: the layout.
        tiles: sizes; they divide n and c.
        tile_rows: rows that groups are padded to.
        multiprocessors: blocks to run.
        interpret: parameters of the interpreter, or None.
    """
    plan = _Plan(tiles, out.rows.shape[1], columns.rows.shape[1], slots.first_tile.shape[0], tile_rows)
    plan.check()
    dtype, gathered = out.rows.dtype, out.gathered or columns.gathered
    chunk = store_chunk(tiles.columns)
    stored = (plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(2 * chunk))
    scratch: list[Any] = [
        plgpu.SMEM((tiles.stages, SLAB, tiles.out), dtype, transforms=TILED),
        plgpu.SMEM((tiles.stages, SLAB, tiles.columns), dtype, transforms=TILED),
        plgpu.SMEM((plan.consumers, 2, WARPGROUP_ROWS, chunk), dtype, transforms=stored),
        plgpu.Barrier(num_arrivals=2 + gathered, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=tiles.stages),
    ]

    def body(
        token: Any, first_tile: Any, expert_tiles: Any, out_g: Any, columns_g: Any, result: Any, *refs: Any
    ) -> None:
        out_s, columns_s, stored_s, full, empty = refs
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        ring = Ring(out_s, columns_s, full, empty, tiles.stages)
        walk = _Walk(plan, first_tile, expert_tiles, sm, multiprocessors)

        @pl.when(wg == plan.consumers)
        def _() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(
                walk, ring, token, (out_g, columns_g), (out.gathered, columns.gathered), interpret is not None
            )

        @pl.when(wg < plan.consumers)
        def _() -> None:
            plgpu.set_max_registers(consumer_registers(plan.consumers), action="increase")
            _consume(walk, ring, result, StorePieces(stored_s.at[wg]), wg)

    options = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.experts * plan.out, plan.size), dtype),
        grid=(multiprocessors,),
        grid_names=("sm",),
        num_threads=plan.consumers + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
        ),
        **options,
    )
    result = run(slots.token, slots.first_tile, slots.expert_tiles, out.rows, columns.rows)
    return result.reshape(plan.experts, plan.out, plan.size)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes: n and c, and one consumer for every 64 rows of a tile."""

    tiles: GradientTiles
    out: int
    size: int
    experts: int
    tile_rows: int

    @property
    def consumers(self) -> int:
        return self.tiles.out // WARPGROUP_ROWS

    def check(self) -> None:
        tiles = self.tiles
        check_stages(tiles.stages)
        if self.out % tiles.out or self.size % tiles.columns or tiles.out % SLAB or tiles.columns % SLAB:
            raise NotImplementedError(
                f"a gradient of ({self.out}, {self.size}) in tiles of ({tiles.out}, {tiles.columns}): they must divide "
                f"it and be multiples of {SLAB}"
            )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The order of tiles: all of one expert, whose rows stay in the cache, before the next."""

    plan: _Plan
    first_tile: Any
    expert_tiles: Any
    first: Any
    stride: int

    @property
    def length(self) -> Any:
        total = self.plan.experts * self._down * self._across
        return lax.div(total - self.first + (self.stride - 1), jnp.int32(self.stride))

    @property
    def _down(self) -> int:
        return self.plan.out // self.plan.tiles.out

    @property
    def _across(self) -> int:
        return self.plan.size // self.plan.tiles.columns

    def at(self, i: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Expert, row tile and column tile of the gradient, first slot and number of steps."""
        index = self.first + i * self.stride
        expert = lax.div(index, jnp.int32(self._down * self._across))
        within = index - expert * (self._down * self._across)
        column = lax.div(within, jnp.int32(self._down))
        first = self.first_tile[expert] * self.plan.tile_rows
        steps = self.expert_tiles[expert] * (self.plan.tile_rows // SLAB)
        return expert, within - column * self._down, column, first, steps


def _produce(
    walk: _Walk, ring: Ring, token: Any, sources: Sequence[Any], gathered: Sequence[bool], interpret: bool
) -> None:
    tiles = walk.plan.tiles

    def tile(i: Any, step: Any) -> Any:
        _, m, n, first, steps = walk.at(i)

        def fill(k: Any, step: Any) -> Any:
            slot = ring.slot(step)

            @pl.when(step >= ring.stages)
            def _() -> None:
                plgpu.barrier_wait(ring.empty.at[slot])

            row, full = first + k * SLAB, ring.full.at[slot]
            # Copies of the engine first, so that they run while this warpgroup's threads gather.
            order = sorted(range(2), key=lambda side: gathered[side])
            for side in order:
                target = (ring.rows, ring.weights)[side].at[slot]
                width = (tiles.out, tiles.columns)[side]
                column = (m, n)[side] * width
                if gathered[side]:
                    issue_rows(sources[side], token, row, column, target, interpret=interpret)
                    plgpu.barrier_arrive(full)
                else:
                    source = sources[side].at[pl.ds(row, SLAB), pl.ds(column, width)]
                    plgpu.copy_gmem_to_smem(source, target, full)
            if any(gathered):
                await_rows(LAG * sum(gathered), interpret=interpret)

                @pl.when(step >= LAG)
                def _() -> None:
                    plgpu.barrier_arrive(ring.full.at[ring.slot(step - LAG)])

            return step + 1

        return lax.fori_loop(0, steps, fill, step)

    step = lax.fori_loop(0, walk.length, tile, jnp.int32(0))
    if any(gathered):
        ring.hand_over_the_last(step, LAG, interpret)


def _consume(walk: _Walk, ring: Ring, result: Any, store: StorePieces, wg: Any) -> None:
    plan, tiles = walk.plan, walk.plan.tiles
    row_in_tile = wg * WARPGROUP_ROWS

    def tile(i: Any, step: Any) -> Any:
        expert, m, n, _, steps = walk.at(i)

        def accumulate(acc: Any) -> Any:
            def multiply(k: Any, step: Any) -> Any:
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.full.at[slot])
                out = ring.rows.at[slot, :, pl.ds(row_in_tile, WARPGROUP_ROWS)].transpose((1, 0))
                plgpu.wgmma(acc, out, ring.weights.at[slot])
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _() -> None:
                    plgpu.barrier_arrive(ring.empty.at[ring.slot(step - 1)])

                return step + 1

            last = lax.fori_loop(0, steps, multiply, step) - 1
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _() -> None:
                plgpu.barrier_arrive(ring.empty.at[ring.slot(last)])

            return acc[...]

        acc = pl.run_scoped(
            accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.columns), jnp.float32)
        )
        row = expert * plan.out + m * tiles.out + row_in_tile
        column = n * tiles.columns
        chunk = store_chunk(tiles.columns)
        pieces = store.begin()
        for start in range(0, tiles.columns, chunk):
            piece = acc[:, start : start + chunk].astype(result.dtype)
            pieces.store(piece, result.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(column + start, chunk)])
        return step + steps

    lax.fori_loop(0, walk.length, tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
