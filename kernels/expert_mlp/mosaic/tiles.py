"""Tile sizes of the GPU kernels: measured ones where there are any, else a heuristic; and the set to search."""

import dataclasses
from collections.abc import Iterator, Mapping

from jaxmoe.kernels.expert_mlp.tuning.measured import launch_key

Measurements = Mapping[str, Mapping[str, int]]

SHARED_MEMORY_BYTES = 232_448
"""Of one block on Hopper."""

RESERVED_BYTES = 2048
"""Of those, for barriers, small vectors and alignment."""

LAG = 2
"""Stages whose gathered rows are still on their way while the producer goes on."""

FEWEST_STAGES = LAG + 2
"""A consumer frees a stage when it has the one after it, which comes LAG steps late: with fewer, both would wait."""


@dataclasses.dataclass(frozen=True)
class MatmulTiles:
    """Of the grouped matmul.

    Attributes:
        rows: rows of slots in a tile, 64 or 128: what groups are padded to.
        columns: columns of each part (gate, up) in a tile.
        stages: steps along the contraction whose operands are in shared memory at once.
        band: tiles of rows that are worked on together, so that they find their weights in the cache.
    """

    rows: int
    columns: int
    stages: int
    band: int = 8


@dataclasses.dataclass(frozen=True)
class GradientTiles:
    """Of the weight gradient, an (out, in) matrix for each expert.

    Attributes:
        out: rows of a tile, 64, 128 or 192: one consumer for every 64.
        columns: columns of a tile.
        stages: steps of 64 slots whose operands are in shared memory at once.
    """

    out: int
    columns: int
    stages: int


def slot_rows(slots: int, groups: int, packed_bytes: int = 0) -> int:
    """Rows that groups are padded to: 64 where groups are so small that 128 would waste more than it saves.

    Beside `packed_bytes` (see `MatmulLaunch`) above 64, and what the activation's gradient reads, shared memory has no
    room for stages of the 128 columns that tiles of 64 rows have at least.
    """
    return 128 if slots >= 192 * groups or packed_bytes > 64 else 64


def stages_that_fit(per_stage: int, fixed: int, most: int = 6) -> int:
    """As many stages as shared memory holds beside `fixed` bytes, `most` at the most."""
    return min(most, (SHARED_MEMORY_BYTES - fixed - RESERVED_BYTES) // per_stage)


@dataclasses.dataclass(frozen=True)
class MatmulLaunch:
    """What tiles of the grouped matmul depend on.

    Attributes:
        rows: rows that groups are padded to.
        columns: n, of one part.
        contraction: c of the first segment; what LoRA and biases add is short.
        parts: gate and up, or one.
        contract_first: whether the weights are contracted over their first axis.
        kept_parts: parts of the pre-activation that the epilogue reads; 0 for other epilogues.
        packed_bytes: of codes and scales, where weights are packed: for 64 columns of a row.
    """

    rows: int
    columns: int
    contraction: int
    parts: int = 1
    contract_first: bool = False
    kept_parts: int = 0
    packed_bytes: int = 0

    @property
    def key(self) -> str:
        return launch_key("matmul", **dataclasses.asdict(self))

    def tiles(self, measured: Measurements) -> MatmulTiles:
        """Measured tiles, or as wide as the accumulators of two warpgroups allow and then as deep as fits.

        Raises:
            NotImplementedError: no tile divides `columns`, or none that does fits.
        """
        if self.key in measured:
            return MatmulTiles(**measured[self.key])
        return next(self.candidates())

    def candidates(self) -> Iterator[MatmulTiles]:
        """Tiles to search, the heuristic's choice first."""
        step = (64 if self.contract_first else 32) * (128 // self.rows)
        widest_tile = 128 if self.kept_parts else 256 // self.parts
        widths = [c for c in range(widest_tile // step * step, 0, -step) if self.columns % c == 0]
        if not widths:
            raise NotImplementedError(f"{self.columns} columns are no multiple of {step}")
        depths = {width: self._stages(width) for width in widths}
        if max(depths.values()) < FEWEST_STAGES:
            raise NotImplementedError(
                f"shared memory holds {depths[widths[-1]]} stages; expected {FEWEST_STAGES}"
            )
        for width, most in depths.items():
            for stages in range(most, FEWEST_STAGES - 1, -1):
                for band in (8, 16, 4):
                    yield MatmulTiles(self.rows, width, stages, band)

    def _stages(self, width: int) -> int:
        """As many as fit."""
        per_stage = 128 * self.rows + (128 + self.packed_bytes) * self.parts * width
        return stages_that_fit(per_stage, fixed=4 * 64 * 64 * 2 + 256 * self.kept_parts * width)


@dataclasses.dataclass(frozen=True)
class GradientLaunch:
    """What tiles of the weight gradient depend on: the gradient's shape (out, columns)."""

    out: int
    columns: int

    @property
    def key(self) -> str:
        return launch_key("gradient", **dataclasses.asdict(self))

    def tiles(self, measured: Measurements) -> GradientTiles:
        """Measured tiles, or the heuristic's.

        Raises:
            NotImplementedError: a side is no multiple of 64.
        """
        if self.key in measured:
            return GradientTiles(**measured[self.key])
        return next(self.candidates())

    def candidates(self) -> Iterator[GradientTiles]:
        """Tiles to search, the heuristic's choice first."""
        if self.out % 64 or self.columns % 64:
            raise NotImplementedError(
                f"a gradient of ({self.out}, {self.columns}): a side is no multiple of 64"
            )
        for rows in (128, 192, 64):
            for across in (256, 192, 128, 64):
                # Beside three consumers' stores there is room for stages of 128 columns.
                if self.out % rows or self.columns % across or (rows == 192 and across > 128):
                    continue
                most = stages_that_fit(128 * (rows + across), (rows // 64) * 2 * 64 * 64 * 2)
                for stages in range(most, FEWEST_STAGES - 1, -1):
                    yield GradientTiles(rows, across, stages)
