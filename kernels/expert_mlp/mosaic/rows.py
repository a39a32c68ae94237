"""Rows of an array in GPU memory, chosen by index, into shared memory: the gather inside the kernels.

On Hopper the copy engine moves boxes, not lists of rows, so the threads of the producer copy them, 16 bytes each,
with cp.async. The interpreter cannot run that piece of machine code; there a whole slab of columns is indexed.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

SLAB = 64
"""Columns of 16 bits in the 128 bytes that a swizzled row of shared memory holds."""

TILED = (plgpu.TilingTransform((8, SLAB)), plgpu.SwizzleTransform(128))


def issue_rows(source: Any, tokens: Any, first: Any, column: Any, target: Any, *, interpret: bool) -> None:
    """Begin to copy source[tokens[first + i], column:column + c] to target[i]; 128 threads together.

    Args:
        source: ref (R, …) of 16-bit elements in GPU memory, its width a multiple of 8.
        tokens: ref (p,) int32 in GPU memory.
        first: the first index.
        column: the first column, a multiple of 8.
        target: ref (rows, c) in shared memory, laid out as `TILED`; rows a multiple of 16, c of 64.
        interpret: whether the interpreter runs this.
    """
    rows, columns = target.shape
    if interpret:
        slab = source[:, pl.ds(column, columns)]
        target[...] = jnp.take(slab, tokens[pl.ds(first, rows)], axis=0, mode="fill")
        return
    slabs = columns // SLAB
    # A thread copies chunk tid % 8 (16 bytes) of rows tid / 8, tid / 8 + 16, …. Eight rows of 128 bytes make a block
    # of 1024; within it the chunk of row r lands at chunk ^ (r % 8). Blocks of one row of tiles follow each other.
    code = [
        ".reg .u32 tid, chunk, row, inner, to, token;",
        ".reg .u64 index, base, from;",
        "mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 chunk, tid, 7; shr.u32 row, tid, 3;",
        "mul.wide.u32 index, row, 4; add.u64 index, index, $2;",
        "and.b32 inner, row, 7; xor.b32 to, inner, chunk; shl.b32 to, to, 4;",
        "shl.b32 inner, inner, 7; add.u32 to, to, inner;",
        f"shr.u32 row, row, 3; mad.lo.u32 to, row, {1024 * slabs}, to; add.u32 to, to, $0;",
        "mul.wide.u32 base, chunk, 16; add.u64 base, base, $1;",
    ]
    for step in range(rows // 16):
        code.append(f"ld.global.nc.u32 token, [index+{64 * step}];")
        code.append(f"mad.wide.u32 from, token, {2 * source.shape[1]}, base;")
        for slab in range(slabs):
            to = 2048 * slabs * step + 1024 * slab
            code.append(f"cp.async.cg.shared.global.L2::128B [to+{to}], [from+{128 * slab}], 16;")
    code.append("cp.async.commit_group;")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(TILED)))
    def copy(_: Any, source: Any, tokens: Any, target: Any) -> None:
        pointers = [mgpu_utils.memref_ptr(ref) for ref in (target, source, tokens)]
        assemble(code, pointers, "r,l,l")

    copy(source.at[:, pl.ds(column, columns)], tokens.at[pl.ds(first, rows)], target)


def issue_nothing(*, interpret: bool) -> None:
    """Count as a call of `issue_rows` that copies nothing, where another step of the same loop makes one."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def commit(_: Any) -> None:
        assemble(["cp.async.commit_group;"], [], "")

    commit()


def await_rows(pending: int, *, interpret: bool) -> None:
    """Wait until all but the last `pending` calls of `issue_rows` are done and the tensor cores may read them."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        assemble([f"cp.async.wait_group {pending};", "fence.proxy.async.shared::cta;"], [], "")

    wait()


def assemble(code: list[str], operands: list[Any], constraints: str) -> None:
    """Machine code (PTX) in place, its registers its own; $0, $1, … are the operands."""
    text = "{ " + " ".join(code) + " }"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)
