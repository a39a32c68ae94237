"""How weights in few bits come into the grouped matmul: copies of codes and scales, and the warpgroup that unpacks.

Each stage of the ring has room for codes and scales beside the one for weights. When the consumers have freed a stage
the producer has the copy engine bring them there; the unpacker waits for that, writes the values to where the
consumers look for weights, and arrives at the stage's barrier in place of the copies of a plain matrix.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.kernels.expert_mlp.mosaic.packed import Form, PackedMatrices, unpack_slab
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB

REGISTERS = 88
"""Of each thread of the unpacker."""


@dataclasses.dataclass(frozen=True)
class Unpacking:
    """What a launch with packed weights has more than others.

    Attributes:
        form: how they are packed.
        geometry: the launch's.
        stages: of the ring.
    """

    form: Form
    geometry: Any
    stages: int

    def scratch(self) -> list[Any]:
        """Codes and scales of every stage, and the barriers that say that these are there."""
        slabs, rows = self.geometry.slabs, self.geometry.weight_rows
        copies = self.geometry.pieces * slabs * (1 + self.form.slab_scales)
        return [
            plgpu.SMEM((self.stages, slabs, rows, self.form.slab_bytes), jnp.uint8),
            plgpu.SMEM((self.stages, slabs, self.form.slab_scales, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages),
        ]

    def copy(
        self, weights: PackedMatrices, width: int, expert: Any, n: Any, k: Any, slot: Any, refs: Any
    ) -> None:
        """Begin to copy a stage's codes and scales.

        Args:
            weights: refs of all experts' matrices.
            width: of the contraction.
            expert: whose matrix.
            n: column tile.
            k: step along the contraction.
            slot: stage.
            refs: those of `scratch`.
        """
        geometry, form = self.geometry, self.form
        codes_s, scales_s, loaded = refs
        rows = geometry.matrix_rows(width)
        blocks = (geometry.size if geometry.contract_first else width) // form.block
        for first, place, count in geometry.rows_of_stage(n, k):
            target = pl.ds(place, count)
            for number, slab in enumerate(geometry.slabs_of_stage(n, k)):
                source = weights.codes.at[
                    pl.ds(expert * rows + first, count), pl.ds(form.first_byte(slab), form.slab_bytes)
                ]
                plgpu.copy_gmem_to_smem(source, codes_s.at[slot, number, target], loaded.at[slot])
                for scale in range(form.slab_scales):
                    block = expert * blocks + form.first_scale(slab) + scale
                    source = weights.scales.at[block, pl.ds(first, count)]
                    plgpu.copy_gmem_to_smem(source, scales_s.at[slot, number, scale, target], loaded.at[slot])

    def _unpack(
        self, table: Any, n: Any, k: Any, slot: Any, ring: Any, refs: Any, *, interpret: bool
    ) -> None:
        """Wait for a stage's codes and scales, write their values and hand them over; arguments as of `copy`."""
        codes_s, scales_s, loaded = refs
        plgpu.barrier_wait(loaded.at[slot])
        for number, slab in enumerate(self.geometry.slabs_of_stage(n, k)):
            for half in self.form.halves:

                def write(number: int = number, half: int | None = half) -> None:
                    unpack_slab(
                        self.form,
                        codes_s.at[slot, number],
                        scales_s.at[slot, number],
                        table,
                        ring.weights.at[slot],
                        number,
                        half,
                        interpret=interpret,
                    )

                if half is None:
                    write()
                else:
                    pl.when(self.form.half(slab) == half)(write)
        plgpu.commit_smem()
        for _ in range(self.geometry.pieces):
            plgpu.barrier_arrive(ring.full.at[slot])

    def run(self, segments: Any, operands: Any, walk: Any, ring: Any, refs: Any, *, interpret: bool) -> None:
        """What the unpacker does: all steps of all tiles but those whose weights are plain."""

        def tile(i: Any, step: Any) -> Any:
            _, n = walk.at(i)
            for segment, (_, weights) in zip(segments, operands, strict=True):
                steps = segment.rows.shape[1] // SLAB
                if not isinstance(weights, PackedMatrices):
                    step = step + steps
                    continue

                def one(k: Any, step: Any, table: Any = weights.table) -> Any:
                    self._unpack(table, n, k, ring.slot(step), ring, refs, interpret=interpret)
                    return step + 1

                step = lax.fori_loop(0, steps, one, step)
            return step

        lax.fori_loop(0, walk.length, tile, jnp.int32(0))


def form_of_all(segments: Any) -> Form | None:
    """How the weights of segments are packed, if those of any are.

    Raises:
        NotImplementedError: in several ways.
    """
    forms = {segment.weights.form for segment in segments if isinstance(segment.weights, PackedMatrices)}
    if len(forms) > 1:
        raise NotImplementedError(f"weights packed in several ways in one product: {forms}")
    return next(iter(forms), None)
