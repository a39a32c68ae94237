"""How the grouped matmul's tiles are cut: what a stage of the ring holds, and what of a tile each consumer has."""

import dataclasses
from typing import Any

from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB
from jaxmoe.kernels.expert_mlp.mosaic.tiles import MatmulTiles

WARPGROUP_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a tile is split over the two consumers: by rows, or a tile of 64 rows by columns."""

    tiles: MatmulTiles
    parts: int
    size: int  # n, columns of one part
    contract_first: bool

    @property
    def halves(self) -> int:
        return 2 * WARPGROUP_ROWS // self.tiles.rows

    @property
    def columns(self) -> int:
        """Of one part in one consumer."""
        return self.tiles.columns // self.halves

    @property
    def across(self) -> int:
        return self.size // self.tiles.columns

    @property
    def pieces(self) -> int:
        """Of a stage's weights: stretches of rows that follow each other in an expert's matrix."""
        return 1 if self.contract_first else self.halves * self.parts

    @property
    def weight_rows(self) -> int:
        """Of a stage."""
        return SLAB if self.contract_first else self.parts * self.tiles.columns

    @property
    def slabs(self) -> int:
        """Columns of a stage's weights, in slabs."""
        return self.tiles.columns // SLAB if self.contract_first else 1

    def matrix_rows(self, contraction: int) -> int:
        """Of an expert's matrix."""
        return contraction if self.contract_first else self.parts * self.size

    def rows_of_stage(self, n: Any, k: Any) -> list[tuple[Any, int, int]]:
        """Each piece of a stage's weights: its first row in the matrix, its first row in the stage, its size."""
        if self.contract_first:
            return [(k * SLAB, 0, SLAB)]
        return [
            (
                part * self.size + n * self.tiles.columns + half * self.columns,
                (half * self.parts + part) * self.columns,
                self.columns,
            )
            for half in range(self.halves)
            for part in range(self.parts)
        ]

    def slabs_of_stage(self, n: Any, k: Any) -> list[Any]:
        """Numbers, in a row of the matrix, of a stage's slabs."""
        return [n * self.slabs + slab for slab in range(self.slabs)] if self.contract_first else [k]

    def place(self, wg: Any, m: Any, n: Any) -> "Place":
        half = wg if self.halves == 2 else 0
        row_in_tile = 0 if self.halves == 2 else wg * WARPGROUP_ROWS
        return Place(
            wg=wg,
            row_in_tile=row_in_tile,
            row=m * self.tiles.rows + row_in_tile,
            half=half,
            column=n * self.tiles.columns + half * self.columns,
            column_block=n * self.halves + half,
            tile=m,
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a consumer's part of a tile lies: indices into the tile and into the output."""

    wg: Any
    row_in_tile: Any
    row: Any
    half: Any
    column: Any
    column_block: Any
    tile: Any
