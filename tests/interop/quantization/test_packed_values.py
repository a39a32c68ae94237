"""Formats that take several tensors for one, read in parts: the bfloat16 values that they stand for."""

import numpy as np
import pytest
from helpers import packed, tiny
from helpers.packed import FORMATS
from helpers.quantize import BF16
from helpers.quantized import assert_equal_bits

from jaxmoe import UserError
from jaxmoe.interop.quantization.config import split_config
from jaxmoe.interop.quantization.folder import QuantizedFolder
from jaxmoe.interop.storage.reader import CheckpointFolder

pytestmark = pytest.mark.once  # Tables of values, and numpy arrays.


def opened(folder, config, parts):
    tiny.write_tensors(folder, {f"a.{name}": array for name, array in parts.items()})
    problems = []
    format = split_config({"quantization_config": config}, "")[1]
    files = QuantizedFolder(CheckpointFolder(folder), format, problems)
    assert not problems
    return files


def check(files, expected):
    """The whole, a box, and boxes of it seen with finer axes."""
    shape = expected.shape
    info = files.tensors["a.weight"]
    assert (info.dtype, info.shape, set(files.tensors)) == ("BF16", shape, {"a.weight"})
    whole = [slice(0, size) for size in shape]
    assert_equal_bits(files.read_box("a.weight", shape, whole), expected)
    *lead, rows, columns = shape
    for sizes in (shape, (*lead, 2, rows // 2, columns), (*lead, rows // 2, 2, 4, columns // 4)):
        seen = expected.reshape(sizes)
        for low, high in ((0, 1), (1, 0), (1, 2)):
            box = tuple(slice(low, size - high) if size > 3 else slice(size - 1, size) for size in sizes)
            assert_equal_bits(files.read_box("a.weight", sizes, box), seen[box])
    empty = [*whole[:-2], slice(2, 2), slice(1, 3)]
    assert files.read_box("a.weight", shape, empty).shape == (*lead, 0, 2)
    for chunk in (70, 1 << 20):
        read = b"".join(files.iter_bytes("a.weight", chunk))
        assert_equal_bits(np.frombuffer(read, BF16).reshape(shape), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_values(tmp_path, kind):
    parts, expected = FORMATS[kind].make(packed.random_of(kind), (24, 64))
    check(opened(tmp_path, FORMATS[kind].config, parts), expected)


@pytest.mark.parametrize("zeros", [False, True])
def test_numbers_that_do_not_fill_the_last_word(tmp_path, zeros):
    """28 columns are three and a half words of int32, 18 rows of zero points two and a quarter."""
    config = packed.ct_config(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=14, symmetric=not zeros
    )
    parts, expected = packed.ct_integers(np.random.default_rng(0), (18, 28), group=14, zeros=zeros)
    assert parts["weight_packed"].shape == (18, 4)
    check(opened(tmp_path, config, parts), expected)


@pytest.mark.parametrize(
    ("kind", "size"), [("float per tensor", None), ("float per row", -1), ("int4", 32), ("int8", -1)]
)
def test_a_strategy_that_follows_from_the_size_of_groups(tmp_path, kind, size):
    weights = FORMATS[kind].config["config_groups"]["group_0"]["weights"]
    parts, expected = FORMATS[kind].make(packed.random_of(kind), (24, 64))
    given = packed.ct_config(
        FORMATS[kind].config["format"], **weights | {"strategy": None, "group_size": size}
    )
    check(opened(tmp_path, given, parts), expected)


@pytest.mark.parametrize("kind", ["int4 with zero points", "mxfp4", "float per row"])
def test_experts_in_one_tensor(tmp_path, kind):
    """compressed-tensors packs each matrix of three axes for itself."""
    random = packed.random_of(kind)
    made = [FORMATS[kind].make(random, (24, 64)) for _ in range(3)]
    parts = {name: np.stack([parts[name] for parts, _ in made]) for name in made[0][0]}
    if "weight_shape" in parts:
        parts["weight_shape"] = np.array([3, 24, 64])
    check(opened(tmp_path, FORMATS[kind].config, parts), np.stack([values for _, values in made]))


def test_a_zero_point_that_borrows(tmp_path):
    """GPTQModel takes the one from a whole int32, so that a zero point of 0 takes one more from the next."""
    parts, expected = packed.gptq(np.random.default_rng(0), (64, 96), less_one=False)
    assert (parts["qzeros"].view(np.uint32) & 15 == 0).any()
    parts["qzeros"] = (parts["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    check(opened(tmp_path, FORMATS["gptq"].config, parts), expected)


def test_rows_that_are_stored_transposed_are_read_once(tmp_path):
    parts, _ = packed.awq(np.random.default_rng(0), (24, 64))
    files = opened(tmp_path, FORMATS["awq"].config, parts)
    for _ in files.iter_bytes("a.weight", 130):
        pass
    assert files.bytes_read == sum(array.nbytes for array in parts.values())


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "modelopt nvfp4", "int4 with zero points"])
def test_a_part_of_the_rows_is_read_alone(tmp_path, kind):
    parts, _ = FORMATS[kind].make(packed.random_of(kind), (2**14, 64))
    files = opened(tmp_path, FORMATS[kind].config, parts)
    files.read_box("a.weight", (2**14, 64), (slice(2**13, 2**13 + 2**12), slice(0, 64)))
    total = sum(array.nbytes for array in parts.values())
    assert total / 4 <= files.bytes_read <= total / 4 + 100


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_group_that_is_not_there(tmp_path, wrong):
    parts, _ = packed.gptq(np.random.default_rng(0), (24, 64), shuffled=True)
    parts["g_idx"][5] = wrong
    files = opened(tmp_path, FORMATS["gptq"].config, parts)
    with pytest.raises(UserError, match=f"tensor a.g_idx has the group {wrong}, expected 0 to 1"):
        files.read_box("a.weight", (24, 64), (slice(0, 2), slice(0, 3)))


def test_a_shape_that_is_another(tmp_path):
    parts, _ = packed.ct_integers(np.random.default_rng(0), (24, 64))
    parts["weight_shape"][1] = 60
    files = opened(tmp_path, FORMATS["int4"].config, parts)
    with pytest.raises(UserError, match=r"tensor a.weight_shape says \[24, 60\], expected \[24, 64\]"):
        files.read_box("a.weight", (24, 64), (slice(0, 2), slice(0, 3)))
