"""How weights in few bits come into the grouped matmul: copies of codes and scales, and the warpgroup that unpacks.

Each stage of the ring has room for codes and scales beside the one for weights. When the consumers have freed a stage
the producer has the copy engine bring them there; the unpacker waits for that, writes the values to where the
consumers look for weights, and arrives at the stage's barrier in place of the copies of a plain matrix. Nobody says
that codes may be overwritten: the producer does that when the consumers are done with what was made of them.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.kernels.expert_mlp.mosaic.geometry import Geometry
from jaxmoe.kernels.expert_mlp.mosaic.packed import Form, PackedMatrices, unpack_slab
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB


@dataclasses.dataclass(frozen=True)
class Unpacking:
    """What a launch with packed weights has more than others.

    Attributes:
        form: how they are packed.
        geometry: the launch's.
        codes: those of every stage, in shared memory (stages, slabs, rows, bytes).
        scales: likewise (stages, slabs, scales, rows).
        loaded: barriers that say that a stage's are there.
    """

    form: Form
    geometry: Geometry
    codes: Any
    scales: Any
    loaded: Any

    def copy(self, weights: PackedMatrices, width: int, expert: Any, n: Any, k: Any, slot: Any) -> None:
        """Begin to copy a stage's codes and scales.

        Args:
            weights: refs of all experts' matrices.
            width: of the contraction.
            expert: whose matrix.
            n: column tile.
            k: step along the contraction.
            slot: stage.
        """
        geometry, form, loaded = self.geometry, self.form, self.loaded.at[slot]
        rows = geometry.matrix_rows(width)
        blocks = pl.cdiv(geometry.size if geometry.contract_first else width, form.block)
        for first, place, count in geometry.rows_of_stage(n, k):
            target = pl.ds(place, count)
            for number, slab in enumerate(geometry.slabs_of_stage(n, k)):
                source = weights.codes.at[
                    pl.ds(expert * rows + first, count), pl.ds(form.first_byte(slab), form.slab_bytes)
                ]
                plgpu.copy_gmem_to_smem(source, self.codes.at[slot, number, target], loaded)
                for scale in range(form.slab_scales):
                    block = expert * blocks + form.first_scale(slab) + scale
                    source = weights.scales.at[block, pl.ds(first, count)]
                    plgpu.copy_gmem_to_smem(source, self.scales.at[slot, number, scale, target], loaded)

    def run(self, operands: Any, walk: Any, ring: Any, *, interpret: bool) -> None:
        """What the unpacker does: all steps of all tiles but those whose weights are plain."""

        def tile(i: Any, step: Any) -> Any:
            _, n = walk.at(i)
            for rows, weights in operands:
                steps = rows.shape[1] // SLAB
                if not isinstance(weights, PackedMatrices):
                    step = step + steps
                    continue

                def one(k: Any, step: Any, table: Any = weights.table) -> Any:
                    slot = ring.slot(step)
                    plgpu.barrier_wait(self.loaded.at[slot])
                    self._write(table, n, k, slot, ring.weights.at[slot], interpret=interpret)
                    plgpu.commit_smem()
                    for _ in range(self.geometry.pieces):
                        plgpu.barrier_arrive(ring.full.at[slot])
                    return step + 1

                step = lax.fori_loop(0, steps, one, step)
            return step

        lax.fori_loop(0, walk.length, tile, jnp.int32(0))

    def _write(self, table: Any, n: Any, k: Any, slot: Any, target: Any, *, interpret: bool) -> None:
        """A stage's values to `target`."""
        for number, slab in enumerate(self.geometry.slabs_of_stage(n, k)):
            codes, scales = self.codes.at[slot, number], self.scales.at[slot, number]
            for half in self.form.halves:
                write = functools.partial(
                    unpack_slab, self.form, codes, scales, table, target, number, half, interpret=interpret
                )
                if half is None:
                    write()
                else:
                    pl.when(self.form.half(slab) == half)(write)


def unpacking_scratch(form: Form, geometry: Geometry) -> list[Any]:
    """The last three of `Unpacking`."""
    stages, slabs, rows = geometry.tiles.stages, geometry.slabs, geometry.weight_rows
    copies = geometry.pieces * slabs * (1 + form.slab_scales)
    return [
        plgpu.SMEM((stages, slabs, rows, form.slab_bytes), form.decoding.dtype),
        plgpu.SMEM((stages, slabs, form.slab_scales, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    ]


def form_of_all(segments: Any) -> Form | None:
    """How the weights of segments are packed, if those of any are.

    Raises:
        NotImplementedError: in several ways.
    """
    forms = {segment.weights.form for segment in segments if isinstance(segment.weights, PackedMatrices)}
    if len(forms) > 1:
        raise NotImplementedError(f"weights packed in several ways in one product: {forms}")
    return next(iter(forms), None)
