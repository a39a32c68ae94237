"""Grouped matmul on Hopper: tiles of slots times their expert's matrix, an epilogue on the accumulator.

One persistent kernel of three warpgroups per multiprocessor. The producer streams operands into a ring of stages in
shared memory: weights by the copy engine (TMA), rows of the left operand either so too, or gathered by index with
cp.async (`mosaic.rows`). The two consumers run the tensor cores (wgmma) and the epilogue. The contraction may run over
several segments, each a pair of operands: a low-rank update W + B A is one more segment, [x | x Aᵀ] · [W | B]ᵀ. Where
weights are packed in few bits a fourth warpgroup unpacks them on their way (`mosaic.unpacking`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.kernels.expert_mlp.mosaic.geometry import WARPGROUP_ROWS, Geometry, Place
from jaxmoe.kernels.expert_mlp.mosaic.packed import PackedMatrices
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB, TILED, await_rows, issue_nothing, issue_rows
from jaxmoe.kernels.expert_mlp.mosaic.slots import Slots
from jaxmoe.kernels.expert_mlp.mosaic.tiles import FEWEST_STAGES, LAG
from jaxmoe.kernels.expert_mlp.mosaic.unpacking import Unpacking, form_of_all, unpacking_scratch

PRODUCER_REGISTERS, UNPACKER_REGISTERS = 56, 88
REGISTERS = 65_536 // 128
"""Of a multiprocessor, for each thread of a warpgroup."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """One stretch of the contraction.

    Attributes:
        rows: (R, c) to be gathered by token, or (p, c) in slot order; c a multiple of 64.
        weights: (E * parts * n, c), or where `contract_first` (E * c, n) with one part; or such a one packed.
        gathered: whether rows are gathered.
    """

    rows: jax.Array
    weights: jax.Array | PackedMatrices
    gathered: bool


@runtime_checkable
class Epilogue(Protocol):
    """What happens to an accumulator (64, parts * columns) in float32."""

    @property
    def operands(self) -> Sequence[jax.Array]: ...
    def outputs(self, slots: int, geometry: Geometry) -> Sequence[jax.ShapeDtypeStruct]: ...
    def scratch(self, geometry: Geometry) -> Sequence[Any]: ...
    def begin(self, refs: Sequence[Any], geometry: Geometry, place: Place) -> None: ...
    def finish(self, refs: Sequence[Any], geometry: Geometry, place: Place, acc: Any, store: Any) -> None: ...


def grouped_matmul(
    segments: Sequence[Segment],
    slots: Slots,
    epilogue: Epilogue,
    geometry: Geometry,
    *,
    multiprocessors: int,
    interpret: Any = None,
) -> list[jax.Array]:
    """Run the kernel; outputs are those of the epilogue, rows past the tiles in use are left as they were."""
    tiles, dtype = geometry.tiles, segments[0].rows.dtype
    _check(segments, geometry)
    chunk = store_chunk(geometry.columns)
    any_gathered = any(segment.gathered for segment in segments)
    form = form_of_all(segments)
    weight_tile = (geometry.weight_rows, geometry.slabs * SLAB)
    stored = (plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(2 * chunk))
    scratch: list[Any] = [
        plgpu.SMEM((tiles.stages, tiles.rows, SLAB), dtype, transforms=TILED),
        plgpu.SMEM((tiles.stages, *weight_tile), dtype, transforms=TILED),
        plgpu.SMEM((2, 2, WARPGROUP_ROWS, chunk), dtype, transforms=stored),
        # Copies of weights, and the rows: one more arrival, two if some rows are gathered (see `_produce`).
        plgpu.Barrier(num_arrivals=geometry.pieces + 1 + any_gathered, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        *([] if form is None else unpacking_scratch(form, geometry)),
        *epilogue.scratch(geometry),
    ]
    outputs = list(epilogue.outputs(tiles.rows * slots.tile_expert.shape[0], geometry))
    operands, pairs = jax.tree.flatten([(segment.rows, segment.weights) for segment in segments])
    extras = len(epilogue.operands) + len(outputs)

    def body(token: Any, tile_expert: Any, num_tiles: Any, *refs: Any) -> None:
        operand_refs, refs = jax.tree.unflatten(pairs, refs[: len(operands)]), refs[len(operands) :]
        extra_refs, refs = refs[:extras], refs[extras:]
        rows_s, weights_s, stored_s, full, empty = refs[:5]
        unpacking = None if form is None else Unpacking(form, geometry, *refs[5:8])
        epilogue_refs = (*extra_refs, *refs[5 if form is None else 8 :])
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        walk = _Walk(num_tiles[0], geometry.across, tiles.band, sm, multiprocessors)
        ring = Ring(rows_s, weights_s, full, empty, tiles.stages)

        @pl.when(wg == 2)
        def _() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            refs = (operand_refs, token, tile_expert, ring)
            producer = _Producer(segments, *refs, geometry, unpacking, interpret is not None)
            producer.run(walk, any_gathered)

        def unpack(unpacking: Unpacking) -> None:
            plgpu.set_max_registers(UNPACKER_REGISTERS, action="decrease")
            unpacking.run(operand_refs, walk, ring, interpret=interpret is not None)

        if unpacking is not None:
            pl.when(wg == 3)(functools.partial(unpack, unpacking))

        @pl.when(wg < 2)
        def _() -> None:
            registers = consumer_registers(2, 0 if form is None else UNPACKER_REGISTERS)
            plgpu.set_max_registers(registers, action="increase")
            _consume(segments, walk, ring, geometry, epilogue, epilogue_refs, stored_s, wg)

    options = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=outputs,
        grid=(multiprocessors,),
        grid_names=("sm",),
        num_threads=3 if form is None else 4,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            # Sums run along rows, which lie within a warp: they need no shared memory.
            reduction_scratch_bytes=0,
        ),
        **options,
    )
    return run(slots.token, slots.tile_expert, slots.num_tiles, *operands, *epilogue.operands)


def consumer_registers(consumers: int, others: int = 0) -> int:
    """Registers of each thread of a consumer, when the producer and `others` have their share; a multiple of 8."""
    return min(256, (REGISTERS - PRODUCER_REGISTERS - others) // consumers // 8 * 8)


def store_chunk(columns: int) -> int:
    """Columns that are stored at a time."""
    return 64 if columns % 64 == 0 else 32


def check_stages(stages: int) -> None:
    """Too few stages would be a deadlock."""
    if stages < FEWEST_STAGES:
        raise NotImplementedError(f"{stages} stages; expected {FEWEST_STAGES} or more")


def _check(segments: Sequence[Segment], geometry: Geometry) -> None:
    if any(segment.rows.shape[1] % SLAB for segment in segments):
        widths = ", ".join(str(segment.rows.shape[1]) for segment in segments)
        raise NotImplementedError(f"contraction over {widths}: each must be a multiple of {SLAB}")
    check_stages(geometry.tiles.stages)
    step = SLAB if geometry.contract_first else 32
    if geometry.columns % step or geometry.size % geometry.tiles.columns:
        raise NotImplementedError(
            f"{geometry.size} columns in tiles of {geometry.tiles.columns}, {geometry.columns} for each consumer: the "
            f"tile must divide the size and hold a multiple of {step} for each"
        )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The order of tiles: bands of rows, and in a band all rows before the next column, to share the weights."""

    tiles: Any
    across: int
    band: int
    first: Any
    stride: int

    @property
    def length(self) -> Any:
        return lax.div(self.tiles * self.across - self.first + (self.stride - 1), jnp.int32(self.stride))

    def at(self, i: Any) -> tuple[Any, Any]:
        """Row tile and column tile number i of this multiprocessor."""
        index = self.first + i * self.stride
        band = lax.div(index, jnp.int32(self.band * self.across))
        within = index - band * (self.band * self.across)
        rows = lax.min(jnp.int32(self.band), self.tiles - band * self.band)
        column = lax.div(within, rows)
        return band * self.band + within - column * rows, column


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages in shared memory, and the barriers that say that one is full or empty."""

    rows: Any
    weights: Any
    full: Any
    empty: Any
    stages: int

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.stages))

    def hand_over_the_last(self, steps: Any, lag: int, interpret: bool) -> None:
        """After the last of `steps`: the last `lag` stages, whose gathered rows were still on their way."""
        await_rows(0, interpret=interpret)
        for late in range(lag, 0, -1):

            @pl.when(steps >= late)
            def _(late: int = late) -> None:
                plgpu.barrier_arrive(self.full.at[self.slot(steps - late)])


@dataclasses.dataclass(frozen=True)
class _Producer:
    """The warpgroup that fills the ring."""

    segments: Sequence[Segment]
    operands: Sequence[Any]
    token: Any
    tile_expert: Any
    ring: Ring
    geometry: Geometry
    unpacking: Unpacking | None
    interpret: bool

    def run(self, walk: _Walk, any_gathered: bool) -> None:
        def tile(i: Any, step: Any) -> Any:
            m, n = walk.at(i)
            expert = self.tile_expert[m]
            for number, segment in enumerate(self.segments):

                def fill(k: Any, step: Any, number: int = number, gathered: bool = segment.gathered) -> Any:
                    slot = self.ring.slot(step)

                    @pl.when(step >= self.ring.stages)
                    def _() -> None:
                        plgpu.barrier_wait(self.ring.empty.at[slot])

                    self._copy_weights(number, expert, n, k, slot)
                    self._copy_rows(number, gathered, m, k, slot)
                    if any_gathered and not gathered:
                        issue_nothing(interpret=self.interpret)
                    if any_gathered:
                        await_rows(LAG, interpret=self.interpret)

                        @pl.when(step >= LAG)
                        def _() -> None:
                            plgpu.barrier_arrive(self.ring.full.at[self.ring.slot(step - LAG)])

                    return step + 1

                step = lax.fori_loop(0, segment.rows.shape[1] // SLAB, fill, step)
            return step

        step = lax.fori_loop(0, walk.length, tile, jnp.int32(0))
        if any_gathered:
            self.ring.hand_over_the_last(step, LAG, self.interpret)

    def _copy_weights(self, number: int, expert: Any, n: Any, k: Any, slot: Any) -> None:
        geometry, weights = self.geometry, self.operands[number][1]
        width = self.segments[number].rows.shape[1]
        if isinstance(weights, PackedMatrices):
            assert self.unpacking is not None
            self.unpacking.copy(weights, width, expert, n, k, slot)
            return
        target, full = self.ring.weights.at[slot], self.ring.full.at[slot]
        columns = pl.ds(geometry.slabs_of_stage(n, k)[0] * SLAB, geometry.slabs * SLAB)
        for first, place, count in geometry.rows_of_stage(n, k):
            source = weights.at[pl.ds(expert * geometry.matrix_rows(width) + first, count), columns]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(place, count)], full)

    def _copy_rows(self, number: int, gathered: bool, m: Any, k: Any, slot: Any) -> None:
        rows, tile = self.operands[number][0], self.geometry.tiles.rows
        target, full = self.ring.rows.at[slot], self.ring.full.at[slot]
        if not gathered:
            plgpu.copy_gmem_to_smem(rows.at[pl.ds(m * tile, tile), pl.ds(k * SLAB, SLAB)], target, full)
            return
        issue_rows(rows, self.token, m * tile, k * SLAB, target, interpret=self.interpret)
        # In place of the copy engine's arrival; the one that says that the rows are there comes LAG steps later.
        plgpu.barrier_arrive(full)


def _consume(
    segments: Sequence[Segment],
    walk: _Walk,
    ring: Ring,
    geometry: Geometry,
    epilogue: Epilogue,
    epilogue_refs: Sequence[Any],
    stored: Any,
    wg: Any,
) -> None:
    steps = sum(segment.rows.shape[1] for segment in segments) // SLAB
    columns = geometry.parts * geometry.columns

    def tile(i: Any, step: Any) -> Any:
        place = geometry.place(wg, *walk.at(i))
        epilogue.begin(epilogue_refs, geometry, place)

        def accumulate(acc: Any) -> Any:
            def multiply(k: Any, step: Any) -> Any:
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.full.at[slot])
                rows = ring.rows.at[slot, pl.ds(place.row_in_tile, WARPGROUP_ROWS)]
                if geometry.contract_first:
                    weights = ring.weights.at[slot, :, pl.ds(place.half * columns, columns)]
                else:
                    weights = ring.weights.at[slot, pl.ds(place.half * columns, columns)].transpose((1, 0))
                plgpu.wgmma(acc, rows, weights)
                plgpu.wgmma_wait(1)  # the product before this one is done: its stage is free

                @pl.when(k > 0)
                def _() -> None:
                    plgpu.barrier_arrive(ring.empty.at[ring.slot(step - 1)])

                return step + 1

            last = lax.fori_loop(0, steps, multiply, step) - 1
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.empty.at[ring.slot(last)])
            return acc[...]

        acc = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns), jnp.float32))
        epilogue.finish(epilogue_refs, geometry, place, acc, StorePieces(stored.at[wg]).store)
        return step + steps

    lax.fori_loop(0, walk.length, tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass
class StorePieces:
    """Stores (64, chunk) pieces by the copy engine, through two buffers in shared memory in turn."""

    buffers: Any
    count: int = 0

    def begin(self) -> "StorePieces":
        """For the pieces of one tile: which buffer is next must be known when the loop over tiles is traced."""
        return StorePieces(self.buffers)

    def store(self, piece: Any, target: Any) -> None:
        """Begin to store `piece` to the ref `target` in GPU memory."""
        buffer = self.buffers.at[self.count % 2]
        # The piece before this one has the other buffer and may still be on its way. Before a tile's first piece
        # nothing may: which buffer the last tile ended with is not known here.
        plgpu.wait_smem_to_gmem(1 if self.count else 0, wait_read_only=True)
        self.count += 1
        buffer[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target)
