"""Row-block sizes of the portable backend."""

from dataclasses import dataclass


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
