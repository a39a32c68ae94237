"""Weights in few bits as the grouped matmul takes them, and what a tile's codes and scales stand for.

A slab is 64 columns of some rows. Its codes and scales lie in shared memory as they are; one warpgroup multiplies them
out in float32, rounds once, as `jaxmoe.codecs` does, and writes the values where a plain matrix would have been copied
to. On the device that is machine code made here, with the same steps in jax.numpy for the interpreter.

Another kind of codes is one more `Decoding`, and its case in `form_of` and `packed_matrices`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxmoe.codecs import Fp8Blocks, Int8Rows, Packed, four_bit, int8_rows
from jaxmoe.codecs.tables import values_of
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB, TILED, assemble

LINES = 8
"""Rows that one warp works on at a time, in each four times 8 bytes: its stores then meet every bank once."""


class Decoding(Protocol):
    """What a code stands for before it is multiplied by its scale; hashable."""

    @property
    def bits(self) -> int:
        """Of a code: 4, with two of a block's halves in one byte as in `FourBit`, or 8."""
        ...

    @property
    def dtype(self) -> str:
        """Of the array of codes, which the copy engine moves as it is: converted it would be copied."""
        ...

    @property
    def table(self) -> np.ndarray | None:
        """16 float32 that the kernel is to have at hand."""
        ...

    @property
    def unit(self) -> np.float32 | None:
        """What products of values and scales are multiplied by."""
        ...

    def values(self, codes: jax.Array, table: jax.Array | None) -> jax.Array:
        """Codes, below 16 where they have 4 bits → float32, for the interpreter."""
        ...

    def assembly(self, value: str, word: str, bit: int) -> str:
        """The code at `bit` and above of register `word` → float32 in register `value`.

        Registers for the way are c and d of 32 bits and h of 16; table has the number of the table that is the lane's
        own, by its last four bits. More significant bits of `word` are other codes.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Four bits, a place in one of the books of `jaxmoe.codecs.tables`."""

    kind: str
    bits: int = 4
    dtype: str = "uint8"
    unit: None = None

    @property
    def table(self) -> np.ndarray:
        return np.asarray(values_of(np.arange(16), self.kind))

    def values(self, codes: jax.Array, table: jax.Array | None) -> jax.Array:
        assert table is not None
        return table[codes.astype(jnp.int32)]

    def assembly(self, value: str, word: str, bit: int) -> str:
        # From the lane of that number, among 16: of the index only the last four bits count.
        return f"shr.u32 c, {word}, {bit}; shfl.sync.idx.b32 {value}, table, c, 0x101f, 0xffffffff;"


@dataclasses.dataclass(frozen=True)
class Integers:
    """int8."""

    bits: int = 8
    dtype: str = "int8"
    table: None = None
    unit: np.float32 = int8_rows.UNIT

    def values(self, codes: jax.Array, table: jax.Array | None) -> jax.Array:
        del table
        return codes.astype(jnp.float32)

    def assembly(self, value: str, word: str, bit: int) -> str:
        return f"bfe.s32 c, {word}, {bit}, 8; cvt.rn.f32.s32 {value}, c;"


@dataclasses.dataclass(frozen=True)
class E4M3:
    """float8_e4m3fn."""

    bits: int = 8
    dtype: str = "uint8"
    table: None = None
    unit: None = None

    def values(self, codes: jax.Array, table: jax.Array | None) -> jax.Array:
        del table
        return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)

    def assembly(self, value: str, word: str, bit: int) -> str:
        # Two codes become two halves of a register: the one beside it is left there.
        return (
            f"shr.u32 c, {word}, {bit}; cvt.u16.u32 h, c; cvt.rn.f16x2.e4m3x2 d, h; "
            f"cvt.u16.u32 h, d; cvt.f32.f16 {value}, h;"
        )


@dataclasses.dataclass(frozen=True)
class Form:
    """How matrices are packed.

    Attributes:
        decoding: what a code stands for.
        block: columns of a row that share a scale: 32, 64 or a multiple of 128; where a code has 8 bits any
            multiple of 64, too.
    """

    decoding: Decoding
    block: int

    @property
    def slab_bytes(self) -> int:
        """Of a slab's row. Where the halves of a block are a slab or more, its bytes have codes of another one, too."""
        return SLAB // 2 if self.decoding.bits == 4 and self.block <= SLAB else SLAB

    @property
    def slab_scales(self) -> int:
        """Of a slab's row."""
        return max(1, SLAB // self.block)

    @property
    def row_bytes(self) -> int:
        """Shared memory for a slab's row."""
        return self.slab_bytes + 4 * self.slab_scales

    @property
    def halves(self) -> tuple[int | None, ...]:
        """Which half of a byte a slab is in: 0 for the high one, 1 for the low one, None where it is in all of it."""
        return (0, 1) if self.decoding.bits == 4 and self.block > SLAB else (None,)

    def first_byte(self, slab: Any) -> Any:
        """Of slab number `slab` of a row."""
        if self.halves == (None,):
            return slab * self.slab_bytes
        half = self.block // (2 * SLAB)
        return (_div(slab, 2 * half) * half + _rem(slab, half)) * SLAB

    def half(self, slab: Any) -> Any:
        """Which of `halves` slab number `slab` is in, if it is in one."""
        return _rem(_div(slab, self.block // (2 * SLAB)), 2)

    def first_scale(self, slab: Any) -> Any:
        """The number, in its row, of the first scale of slab number `slab`."""
        return slab * self.slab_scales if self.block <= SLAB else _div(slab, self.block // SLAB)

    def values(
        self, codes: jax.Array, scales: jax.Array, table: jax.Array | None, half: int | None
    ) -> jax.Array:
        """Codes (n, bytes) and scales (b, n) of a slab → (n, 64) float32: what the assembly computes."""
        rows = codes.shape[0]
        if self.decoding.bits == 4 and half is None:
            blocks = codes.reshape(rows, self.slab_scales, -1)
            codes = jnp.stack([blocks >> 4, blocks & 15], 2).reshape(rows, SLAB)
        elif half is not None:
            codes = codes & 15 if half else codes >> 4
        values = self.decoding.values(codes, table) * jnp.repeat(scales.T, SLAB // self.slab_scales, 1)
        return values if self.decoding.unit is None else values * self.decoding.unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrices:
    """The matrices (E, n, c) of all experts.

    Attributes:
        codes: (E * n, bytes), in the dtype of the decoding.
        scales: float32 (E * b, n), those of one block of columns side by side, as the copy engine wants them.
        table: that of the decoding.
        form: what they mean.
    """

    codes: Any
    scales: Any
    table: Any
    form: Form = dataclasses.field(metadata={"static": True})


def form_of(weight: Packed) -> Form:
    """How experts' matrices are packed.

    Raises:
        NotImplementedError: the kernels do not read such.
    """
    if isinstance(weight, Int8Rows):
        return Form(Integers(), block=weight.codes.shape[-1])
    if isinstance(weight, Fp8Blocks):
        block = min(weight.block, weight.codes.shape[-1])
        if block % SLAB:
            raise NotImplementedError(f"blocks of {block} columns are no multiple of {SLAB}")
        return Form(E4M3(), block)
    if weight.shape[-1] % weight.block:
        raise NotImplementedError(f"rows of {weight.shape[-1]} weights are no whole blocks of {weight.block}")
    return Form(Lookup(weight.kind), weight.block)


def packed_matrices(weight: Packed) -> PackedMatrices:
    """Experts' matrices (E, …, c), packed; raises as `form_of` does."""
    form = form_of(weight)
    codes: Any
    scales: Any
    if isinstance(weight, Int8Rows):
        codes, scales = weight.codes, weight.absmax[..., None]
    elif isinstance(weight, Fp8Blocks):
        codes, scales = weight.codes, weight.scales
    else:
        codes, scales = weight.codes, four_bit.plain(weight).absmax
    held, blocks = scales.shape[0], scales.shape[-1]
    # Of one axis and behind a barrier: else XLA would transpose those of all layers before a loop over them.
    flat = lax.optimization_barrier(scales.reshape(-1))
    scales = flat.reshape(held, -1, blocks).swapaxes(1, 2).reshape(held * blocks, -1)
    table = form.decoding.table
    return PackedMatrices(
        codes.reshape(held * scales.shape[1], -1), scales, None if table is None else jnp.asarray(table), form
    )


def unpack_slab(
    form: Form,
    packed: Any,
    scales: Any,
    table: Any,
    target: Any,
    slab: int,
    half: int | None,
    *,
    interpret: bool,
) -> None:
    """Write the values of a slab to `target`; 128 threads together.

    Args:
        form: how it is packed.
        packed: ref (n, bytes) in shared memory, n a multiple of 32.
        scales: ref (b, n) float32 in shared memory.
        table: ref (16,) float32 in GPU memory, or None.
        target: ref (n, c) of 16-bit elements in shared memory, laid out as `TILED`.
        slab: which of the c / 64 slabs of `target` this is.
        half: of the bytes, see `Form.halves`.
        interpret: whether the interpreter runs this.
    """
    if interpret:
        values = form.values(packed[...], scales[...], None if table is None else table[...], half)
        target[:, slab * SLAB : (slab + 1) * SLAB] = values.astype(target.dtype)
        return
    rows, columns = target.shape
    code = assembly(form, rows, columns // SLAB, slab, half, target.dtype)
    refs = [target, packed, scales, *([] if table is None else [table])]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), *[plgpu.RefType()] * (len(refs) - 1)))
    def unpack(_: Any, *refs: Any) -> None:
        assemble(code, [mgpu_utils.memref_ptr(ref) for ref in refs], "r,r,r,l"[: 2 * len(refs) - 1])

    unpack(*refs)


def assembly(form: Form, rows: int, slabs: int, slab: int, half: int | None, dtype: Any) -> list[str]:
    """What 128 threads do in `unpack_slab`; $0 to $3 are the addresses of target, codes, scales and table.

    A thread has row tid / 32 * 8 + tid % 8 of every 32, and there the bytes 8 * chunk to 8 * chunk + 7, chunk being
    tid / 8 % 4; where rows have 64 bytes also those 32 bytes on. That is 8 neighbours, 16 bytes of values, for each
    half of a byte. Blocks of 8 rows and 64 columns have 1024 bytes; in one, 16 bytes number j of row r lie at j ^ r.
    """
    lines = [
        ".reg .b32 tid, line, chunk, row, from, at, to, next, table, c, d;",
        ".reg .b32 f0, f1, f2, f3, f4, f5, f6, f7;",
        ".reg .b16 h;",
        "mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 line, tid, 7;",
        "shr.u32 chunk, tid, 3; and.b32 chunk, chunk, 3;",
        "shr.u32 row, tid, 5;",
        f"mad.lo.u32 to, row, {1024 * slabs}, $0;",
        "shl.b32 row, row, 3; add.u32 row, row, line;",
        f"mad.lo.u32 from, row, {form.slab_bytes}, $1; mad.lo.u32 from, chunk, 8, from;",
        "mad.lo.u32 at, row, 4, $2; mad.lo.u32 to, line, 128, to;",
    ]
    # Where the values of a thread's second 16 bytes lie; the first ones' number has that bit clear.
    away = 64
    if form.slab_scales == 2:
        away = 32
        lines += [
            f"shr.u32 c, chunk, 1; mad.lo.u32 at, c, {4 * rows}, at;",
            "shl.b32 c, c, 2; and.b32 chunk, chunk, 1; or.b32 chunk, chunk, c;",
        ]
    lines += [
        "xor.b32 chunk, chunk, line; mad.lo.u32 to, chunk, 16, to;",
        f"xor.b32 next, to, {away};",
    ]
    if form.decoding.table is not None:
        lines += [
            ".reg .b64 entry;",
            "and.b32 c, tid, 15; mul.wide.u32 entry, c, 4; add.u64 entry, entry, $3;",
            "ld.global.nc.b32 table, [entry];",
        ]
    steps = range(rows // 32)
    for first in range(0, len(steps), 4):  # what is loaded before anything is stored
        some = steps[first : first + 4]
        lines.append("{ .reg .b32 " + ", ".join(f"s{i}, a{i}, b{i}, c{i}, d{i}" for i in some) + ";")
        for i in some:
            lines.append(f"ld.shared.b32 s{i}, [at+{128 * i}];")
            lines += _load(form, i)
        for i in some:
            place = 4096 * slabs * i + 1024 * slab
            for number, (words, bits) in enumerate(_sixteen_bytes(form, i, half)):
                lines += _multiply_out(form.decoding, words, bits, f"s{i}", dtype)
                lines.append(f"st.shared.v4.b32 [{'next' if number else 'to'}+{place}], {{f0, f1, f2, f3}};")
        lines.append("}")
    return lines


def _load(form: Form, step: int) -> Iterable[str]:
    place = 32 * form.slab_bytes * step
    yield f"ld.shared.v2.b32 {{a{step}, b{step}}}, [from+{place}];"
    if form.slab_bytes == SLAB:
        yield f"ld.shared.v2.b32 {{c{step}, d{step}}}, [from+{place + 32}];"


def _sixteen_bytes(form: Form, step: int, half: int | None) -> Iterable[tuple[tuple[str, str], range]]:
    """The two times 8 codes of a thread's step: the registers that they are in, and their first bits in each."""
    words, more = (f"a{step}", f"b{step}"), (f"c{step}", f"d{step}")
    if form.slab_bytes < SLAB:
        return (words, range(4, 32, 8)), (words, range(0, 32, 8))
    bits = range(4, 32, 8) if half == 0 else range(0, 32, 8)
    return (words, bits), (more, bits)


def _multiply_out(
    decoding: Decoding, words: tuple[str, str], bits: Iterable[int], scale: str, dtype: Any
) -> Iterable[str]:
    """8 codes → 16 bytes of values in f0 to f3."""
    codes = [(word, bit) for word in words for bit in bits]
    for number, (word, bit) in enumerate(codes):
        yield decoding.assembly(f"f{number}", word, bit)
        yield f"mul.rn.f32 f{number}, f{number}, {scale};"
        if decoding.unit is not None:
            yield f"mul.rn.f32 f{number}, f{number}, 0f{int(decoding.unit.view(np.uint32)):08X};"
    pair = {jnp.dtype(jnp.bfloat16): "bf16x2", jnp.dtype(jnp.float16): "f16x2"}[jnp.dtype(dtype)]
    for number in range(4):
        yield f"cvt.rn.{pair}.f32 f{number}, f{2 * number + 1}, f{2 * number};"


def _div(slab: Any, by: int) -> Any:
    return lax.div(slab, jnp.int32(by))


def _rem(slab: Any, by: int) -> Any:
    return lax.rem(slab, jnp.int32(by))
