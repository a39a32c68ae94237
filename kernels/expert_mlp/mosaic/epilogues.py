"""What the grouped matmul does with its accumulator: store, activate, or the activation's gradient."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.expert_mlp.mosaic.geometry import WARPGROUP_ROWS, Geometry, Place
from jaxmoe.kernels.expert_mlp.mosaic.matmul import store_chunk
from jaxmoe.kernels.expert_mlp.mosaic.rows import TILED


def _chunks(geometry: Geometry) -> Iterator[tuple[int, int]]:
    chunk = store_chunk(geometry.columns)
    for start in range(0, geometry.columns, chunk):
        yield start, chunk


def _part(acc: Any, geometry: Geometry, part: int, start: int, chunk: int) -> Any:
    first = part * geometry.columns + start
    return acc[:, first : first + chunk]


@dataclasses.dataclass(frozen=True)
class StoreRows:
    """out (p, n) = the product."""

    dtype: Any
    operands: tuple[jax.Array, ...] = ()

    def outputs(self, slots: int, geometry: Geometry) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((slots, geometry.size), self.dtype)]

    def scratch(self, _: Geometry) -> list[Any]:
        return []

    def begin(self, refs: Sequence[Any], geometry: Geometry, place: Place) -> None:
        pass

    def finish(self, refs: Sequence[Any], geometry: Geometry, place: Place, acc: Any, store: Any) -> None:
        (out,) = refs
        for start, chunk in _chunks(geometry):
            piece = _part(acc, geometry, 0, start, chunk).astype(self.dtype)
            store(piece, out.at[pl.ds(place.row, WARPGROUP_ROWS), pl.ds(place.column + start, chunk)])


@dataclasses.dataclass(frozen=True)
class Activate:
    """activation (p, F) of the product; with `save` also the product itself (p, f)."""

    activation: Activation
    dtype: Any
    save: bool
    operands: tuple[jax.Array, ...] = ()

    def outputs(self, slots: int, geometry: Geometry) -> list[jax.ShapeDtypeStruct]:
        widths = [geometry.size, *([geometry.parts * geometry.size] if self.save else [])]
        return [jax.ShapeDtypeStruct((slots, width), self.dtype) for width in widths]

    def scratch(self, _: Geometry) -> list[Any]:
        return []

    def begin(self, refs: Sequence[Any], geometry: Geometry, place: Place) -> None:
        pass

    def finish(self, refs: Sequence[Any], geometry: Geometry, place: Place, acc: Any, store: Any) -> None:
        rows = pl.ds(place.row, WARPGROUP_ROWS)
        for start, chunk in _chunks(geometry):
            parts = tuple(_part(acc, geometry, part, start, chunk) for part in range(geometry.parts))
            value = self.activation.value(parts).astype(self.dtype)
            store(value, refs[0].at[rows, pl.ds(place.column + start, chunk)])
            if self.save:
                for part, values in enumerate(parts):
                    column = part * geometry.size + place.column + start
                    store(values.astype(self.dtype), refs[1].at[rows, pl.ds(column, chunk)])


@dataclasses.dataclass(frozen=True)
class ActivationGradient:
    """From the gradient of the activation, not yet times the router's weight, to all that the backward pass wants.

    Outputs: the pre-activation's gradient (p, f); the weighted activation (p, F), which the gradient of the second
    matrix wants; and (column blocks, p) float32, whose sum over blocks is the gradient of the router's weight. The
    first two are zero for padding; the third is anything there, and nobody asks for it.
    """

    activation: Activation
    dtype: Any
    pre: jax.Array
    weight: jax.Array

    @property
    def operands(self) -> tuple[jax.Array, ...]:
        return (self.pre, self.weight)

    def outputs(self, slots: int, geometry: Geometry) -> list[jax.ShapeDtypeStruct]:
        parts = self.activation.parts
        return [
            jax.ShapeDtypeStruct((slots, parts * geometry.size), self.dtype),
            jax.ShapeDtypeStruct((slots, geometry.size), self.dtype),
            jax.ShapeDtypeStruct((geometry.across * geometry.halves, slots), jnp.float32),
        ]

    def scratch(self, geometry: Geometry) -> list[Any]:
        parts = self.activation.parts
        return [
            plgpu.SMEM((2, parts, WARPGROUP_ROWS, geometry.columns), self.dtype, transforms=TILED),
            plgpu.SMEM((2, WARPGROUP_ROWS), jnp.float32),
            plgpu.SMEM((2, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=parts + 1, num_barriers=2),
        ]

    def begin(self, refs: Sequence[Any], geometry: Geometry, place: Place) -> None:
        pre, weight, _, _, _, pre_s, weight_s, _, loaded = refs
        rows, barrier = pl.ds(place.row, WARPGROUP_ROWS), loaded.at[place.wg]
        for part in range(self.activation.parts):
            columns = pl.ds(part * geometry.size + place.column, geometry.columns)
            plgpu.copy_gmem_to_smem(pre.at[rows, columns], pre_s.at[place.wg, part], barrier)
        plgpu.copy_gmem_to_smem(weight.at[rows], weight_s.at[place.wg], barrier)

    def finish(self, refs: Sequence[Any], geometry: Geometry, place: Place, acc: Any, store: Any) -> None:
        _, _, dpre, weighted, score, pre_s, weight_s, score_s, loaded = refs
        rows = pl.ds(place.row, WARPGROUP_ROWS)
        plgpu.barrier_wait(loaded.at[place.wg])
        dscore = None
        for start, chunk in _chunks(geometry):
            shape = (WARPGROUP_ROWS, chunk)
            weight = jax.lax.broadcast_in_dim(weight_s[place.wg], shape, (0,))
            parts = tuple(
                pre_s[place.wg, part, :, start : start + chunk].astype(jnp.float32)
                for part in range(self.activation.parts)
            )
            da = _part(acc, geometry, 0, start, chunk)
            value, dparts = self.activation.value_and_grad(parts, weight * da)
            row_sum = jnp.sum(da * value, axis=1)
            dscore = row_sum if dscore is None else dscore + row_sum
            zero = jnp.zeros(shape, jnp.float32)
            # A selection, not a product: padding may hold anything.
            store(
                jnp.where(weight != 0, weight * value, zero).astype(self.dtype),
                weighted.at[rows, pl.ds(place.column + start, chunk)],
            )
            for part, values in enumerate(dparts):
                column = part * geometry.size + place.column + start
                store(
                    jnp.where(weight != 0, values, zero).astype(self.dtype),
                    dpre.at[rows, pl.ds(column, chunk)],
                )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        score_s[place.wg] = dscore
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(score_s.at[place.wg], score.at[place.column_block, rows])
