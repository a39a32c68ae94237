"""What unpacks weights inside of the kernels: its machine code, instruction by instruction, against the codecs.

The interpreter of Pallas cannot run that code. It computes `Form.values` in its place, which is held against the same.
"""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.codecs import Packed, four_bit, fp8_blocks, int8_rows, unpack
from jaxmoe.kernels.expert_mlp.mosaic.packed import Form, PackedMatrices, assembly, form_of, packed_matrices
from jaxmoe.kernels.expert_mlp.mosaic.rows import SLAB
from jaxmoe.kernels.expert_mlp.mosaic.tiles import FEWEST_STAGES, MatmulLaunch, slot_rows

THREADS = np.arange(384, 512)  # those of the fourth warpgroup
TARGET, CODES, SCALES, TABLE = 0x4000, 0x80, 0x10000, 0x7F0000000000


class Warpgroup:
    """128 threads that execute PTX in step, each register an array of their 32 or 64 bits."""

    def __init__(self, memory: dict[int, np.ndarray], operands: list[int]) -> None:
        self.memory = memory
        self.registers = {"%tid.x": THREADS.astype(np.uint64)}
        self.registers |= {f"${i}": np.full(128, at, np.uint64) for i, at in enumerate(operands)}
        self.wide: set[str] = set()
        self.written: list[np.ndarray] = []

    def run(self, code: list[str]) -> None:
        for statement in " ".join(code).split(";"):
            instruction = statement.strip(" {}" if "[" not in statement else " ").lstrip("{} ")
            if instruction:
                self._execute(*instruction.split(" ", 1))

    def _execute(self, name: str, rest: str) -> None:
        if name == ".reg":
            kind, names = rest.split(" ", 1)
            self.wide |= set(names.split(", ")) if kind == ".b64" else set()
            return
        if name.startswith(("ld", "st")):
            self._move(name, rest)
            return
        target, *sources = rest.split(", ")
        result = self._compute(name, [self._value(source) for source in sources])
        self.registers[target] = result & np.uint64(2**64 - 1 if target in self.wide else 2**32 - 1)

    def _value(self, text: str) -> np.ndarray:
        if text.startswith("0f"):
            return np.full(128, int(text[2:], 16), np.uint64)
        return self.registers[text] if text in self.registers else np.full(128, int(text, 0), np.uint64)

    def _compute(self, name: str, values: list[np.ndarray]) -> np.ndarray:
        a, b, c = [*values, *[np.zeros(128, np.uint64)] * 2][:3]
        floats = [value.astype(np.uint32).view(np.float32) for value in (a, b)]
        bits = lambda array: array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize]).astype(np.uint64)
        signed = lambda value: value.astype(np.uint32).view(np.int32)
        match name:
            case "mov.u32":
                return a
            case "and.b32":
                return a & b
            case "or.b32":
                return a | b
            case "xor.b32":
                return a ^ b
            case "shl.b32":
                return a << b
            case "shr.u32":
                return a >> b
            case "add.u32" | "add.u64":
                return a + b
            case "mul.wide.u32":
                return a * b
            case "mad.lo.u32":
                return a * b + c
            case "bfe.s32":
                return bits(
                    (signed(a << (np.uint64(32) - b - c)) >> (32 - c.astype(np.int32))).astype(np.int32)
                )
            case "cvt.u16.u32":
                return a & np.uint64(0xFFFF)
            case "cvt.rn.f16x2.e4m3x2":
                pair = [(a >> np.uint64(shift)).astype(np.uint8) for shift in (8, 0)]
                high, low = (bits(one.view(ml_dtypes.float8_e4m3fn).astype(np.float16)) for one in pair)
                return high << np.uint64(16) | low
            case "cvt.f32.f16":
                return bits(a.astype(np.uint16).view(np.float16).astype(np.float32))
            case "cvt.rn.f32.s32":
                return bits(signed(a).astype(np.float32))
            case "mul.rn.f32":
                return bits(floats[0] * floats[1])
            case "cvt.rn.bf16x2.f32":
                high, low = (bits(value.astype(ml_dtypes.bfloat16)) for value in floats)
                return high << np.uint64(16) | low
            case "cvt.rn.f16x2.f32":
                high, low = (bits(value.astype(np.float16)) for value in floats)
                return high << np.uint64(16) | low
            case "shfl.sync.idx.b32":
                # Of two groups of 16 lanes, each with its own.
                assert set(values[2]) == {0x101F}
                assert set(values[3]) == {0xFFFFFFFF}
                lane = np.arange(128) // 16 * 16 + (b & np.uint64(15)).astype(int)
                return a[lane]
        raise NotImplementedError(name)

    def _move(self, name: str, rest: str) -> None:
        count = int((re.search(r"\.v(\d)", name) or [0, 1])[1])
        address = re.search(r"\[(\w+)(?:\+(\d+))?\]", rest)
        assert address
        registers = re.sub(r"\[.*?\]", "", rest).strip("{}, ").split(", ")
        assert len(registers) == count
        first = self.registers[address[1]].astype(np.int64) + int(address[2] or 0)
        assert not (first % (4 * count)).any()
        (base,) = (at for at, array in self.memory.items() if at <= first.min() < at + array.nbytes)
        words = self.memory[base].view(np.uint32)
        place = (first - base)[:, None] // 4 + np.arange(count)
        if name.startswith("st"):
            words[place] = np.stack([self.registers[register] for register in registers], 1)
            self.written.append(first)
            # Eight threads store 128 bytes at once where these are in all 32 banks.
            assert all(len(set(eight)) == 8 for eight in (first // 16 % 8).reshape(16, 8))
            return
        for register, word in zip(registers, words[place].T, strict=True):
            self.registers[register] = word.astype(np.uint64)


def untiled(words: np.ndarray, rows: int, slabs: int, dtype: np.dtype) -> np.ndarray:
    """Shared memory as `TILED` lays it out → (rows, 64 slabs)."""
    blocks = words.view(dtype).reshape(rows // 8, slabs, 8, 8, 8)
    line, chunk = np.arange(8)[:, None], np.arange(8)
    return blocks[:, :, line, chunk ^ line].transpose(0, 2, 1, 3, 4).reshape(rows, slabs * SLAB)


def draw(*shape: int) -> np.ndarray:
    """Experts' matrices whose scales differ a lot."""
    rng = np.random.default_rng(sum(shape))
    scales = 2.0 ** rng.integers(-7, 7, (*shape[:-1], shape[-1] // 32))
    return (rng.standard_normal(shape) * np.repeat(scales, 32, -1)).astype(np.float32)


def pack(kind: str, block: int, values: np.ndarray) -> Packed:
    if kind == "int8":
        return int8_rows.quantize(jnp.asarray(values))
    if kind == "fp8":
        return fp8_blocks.quantize(jnp.asarray(values), block, rows=32)
    name, _, nested = kind.partition(" ")
    return jax.vmap(lambda one: four_bit.quantize(one, name, block, bool(nested)))(jnp.asarray(values))


KINDS = [
    ("nf4", 64),
    ("fp4", 64),
    ("mxfp4", 32),
    ("nf4", 32),
    ("fp4", 128),
    ("nf4", 256),
    ("nf4 nested", 64),
    ("int8", 0),
    ("fp8", 128),
    ("fp8", 192),
    ("fp8", 1024),
]
EXPERTS, ROWS, COLUMNS = 3, 96, 512


def slab_of(packed: PackedMatrices, expert: int, slab: int) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Codes and scales of an expert's slab, and which half of the bytes it is in."""
    form = packed.form
    first = int(form.first_byte(jnp.int32(slab)))
    codes = np.asarray(packed.codes)[expert * ROWS : (expert + 1) * ROWS, first : first + form.slab_bytes]
    scales = np.asarray(packed.scales).reshape(EXPERTS, -1, ROWS)[expert]
    place = int(form.first_scale(jnp.int32(slab)))
    half = None if form.halves == (None,) else int(form.half(jnp.int32(slab)))
    return codes, scales[place : place + form.slab_scales], half


def execute(
    form: Form, codes: np.ndarray, scales: np.ndarray, half: int | None, slab: int, slabs: int, dtype: str
):
    rows = len(codes)
    memory = {
        TARGET: np.zeros(rows * slabs * SLAB // 2, np.uint32),
        CODES: np.ascontiguousarray(codes).reshape(-1),
        SCALES: np.ascontiguousarray(scales).reshape(-1),
    }
    if form.decoding.table is not None:
        memory[TABLE] = np.array(form.decoding.table)
    threads = Warpgroup(memory, [TARGET, CODES, SCALES, TABLE])
    threads.run(assembly(form, rows, slabs, slab, half, jnp.dtype(dtype)))
    places = np.concatenate(threads.written)
    assert len(set(places)) == len(places) == rows * SLAB // 8, "every 16 bytes are written once"
    return untiled(memory[TARGET], rows, slabs, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_machine_code_gives_what_the_codecs_give(kind, block, dtype):
    weight = pack(kind, block, draw(EXPERTS, ROWS, COLUMNS))
    packed = packed_matrices(weight)
    assert packed.form == form_of(weight)
    right = np.asarray(unpack(weight, jnp.dtype(dtype)))
    for expert, slab in ((0, 0), (2, 5), (1, 2), (1, 7)):
        codes, scales, half = slab_of(packed, expert, slab)
        expected = right[expert, :, slab * SLAB : (slab + 1) * SLAB]
        stand_in = packed.form.values(jnp.asarray(codes), jnp.asarray(scales), packed.table, half)
        np.testing.assert_array_equal(stand_in.astype(dtype), expected)
        slabs, place = (1, 0) if slab % 2 else (3, slab // 2 % 3)
        found = execute(packed.form, codes, scales, half, place, slabs, dtype)
        np.testing.assert_array_equal(found[:, place * SLAB : (place + 1) * SLAB], expected)
        assert np.count_nonzero(found) == np.count_nonzero(expected), "other slabs are left alone"


@pytest.mark.parametrize("rows", [32, 64, 160, 256])
def test_machine_code_for_tiles_of_any_height(rows):
    rng = np.random.default_rng(rows)
    form = Form(form_of(pack("nf4", 64, draw(1, 32, 64))).decoding, 64)
    codes = rng.integers(0, 256, (rows, 32), np.uint8)
    scales = rng.uniform(0.5, 2, (1, rows)).astype(np.float32)
    expected = form.values(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(form.decoding.table), None)
    found = execute(form, codes, scales, None, 0, 1, "bfloat16")
    np.testing.assert_array_equal(found, np.asarray(expected.astype(jnp.bfloat16)))


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_shared_memory_has_room_for_stages_whatever_the_number_of_tokens(kind, block):
    """A launch that did not fit would be met in the backward pass, when another backend is no way out."""
    row_bytes = form_of(pack(kind, block, draw(1, 32, COLUMNS))).row_bytes
    for slots in (10, 100_000):
        rows = slot_rows(slots, 128, row_bytes)
        for launch in (
            MatmulLaunch(rows, 768, 2048, parts=2, packed_bytes=row_bytes),
            MatmulLaunch(rows, 768, 2048, contract_first=True, kept_parts=2, packed_bytes=row_bytes),
        ):
            assert launch.tiles({}).stages >= FEWEST_STAGES


def test_rows_that_are_no_whole_blocks_are_refused():
    weight = jax.vmap(four_bit.quantize)(jnp.ones((2, 6, 96)))
    with pytest.raises(NotImplementedError, match="rows of 96 weights are no whole blocks of 64"):
        packed_matrices(weight)
    with pytest.raises(NotImplementedError, match="blocks of 96 columns are no multiple of 64"):
        packed_matrices(fp8_blocks.quantize(jnp.ones((2, 6, 192)), 96))
