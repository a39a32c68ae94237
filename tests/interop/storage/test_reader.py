"""CheckpointFolder: what is in a folder, and boxes of its tensors."""

import math
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from helpers.files import open_files, random_array, same, write_index, write_raw
from safetensors.numpy import save_file

from jaxmoe.errors import UserError
from jaxmoe.interop.storage import reader
from jaxmoe.interop.storage.format import DTYPES, dtype_name
from jaxmoe.interop.storage.reader import CheckpointFolder

FULL = slice(None)


def test_reads_every_tensor_of_a_sharded_folder(sharded):
    path, arrays = sharded
    with CheckpointFolder(path) as folder:
        assert [shard.file for shard in folder.shards] == [
            f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
        ]
        assert [shard.metadata for shard in folder.shards] == [{"format": "pt"}, None]
        assert [[info.name for info in shard.tensors] for shard in folder.shards] == [["a", "d"], ["c", "b"]]
        assert folder.index["weight_map"]["c"] == "model-00002-of-00002.safetensors"
        assert folder.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert folder.tensors[name].shape == array.shape
            assert folder.tensors[name].dtype == dtype_name(array.dtype)
            assert same(folder.read(name), array)
        assert folder.bytes_read == sum(array.nbytes for array in arrays.values())


def test_shard_prefix_and_size_repeat_the_file(sharded):
    path, _ = sharded
    with CheckpointFolder(path) as folder:
        for shard in folder.shards:
            content = (path / shard.file).read_bytes()
            assert content.startswith(shard.prefix)
            assert len(shard.prefix) == shard.tensors[0].start
            assert shard.file_bytes == len(content)


@pytest.mark.parametrize("name", sorted(name for name, entry in DTYPES.items() if entry.numpy is not None))
def test_every_dtype_agrees_with_the_library(tmp_path, name):
    array = random_array(np.random.default_rng(1), (3, 5), DTYPES[name].numpy)
    save_file({"x": array}, tmp_path / "model.safetensors")
    with CheckpointFolder(tmp_path) as folder:
        assert folder.index is None
        assert folder.tensors["x"].dtype == name == dtype_name(array.dtype)
        assert same(folder.read("x"), array)


def test_shards_below_the_folder(sharded):
    path, arrays = sharded
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (path / "deep" / "er").mkdir(parents=True)
    (path / second).rename(path / "deep" / "er" / second)
    write_index(path, {name: f"./{first}" if name in "ad" else f"deep//er/{second}" for name in arrays})
    with CheckpointFolder(path) as folder:
        assert [shard.file for shard in folder.shards] == [f"deep/er/{second}", first]
        for name, array in arrays.items():
            assert same(folder.read(name), array)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"), [("F4", [2, 5], 5), ("F6_E2M3", [4], 3), ("F6_E3M2", [4, 2], 6)]
)
def test_types_below_a_byte_are_only_copied(tmp_path, name, shape, nbytes):
    data = bytes(range(1, nbytes + 1))
    entry = {"dtype": name, "shape": shape, "data_offsets": [0, nbytes]}
    write_raw(tmp_path / "model.safetensors", {"x": entry}, data)
    with CheckpointFolder(tmp_path) as folder:
        assert b"".join(folder.iter_bytes("x")) == data
        with pytest.raises(UserError, match=rf"'x' has dtype {name}, [46] bits"):
            folder.read("x")


def test_empty_and_scalar_tensors(tmp_path):
    arrays = {
        "zero": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
        "one": np.ones((1, 1), np.int8),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    with CheckpointFolder(tmp_path) as folder:
        for name, array in arrays.items():
            assert same(folder.read(name), array)
        assert same(
            folder.read_box("zero", (2, 0, 3), [FULL, FULL, slice(1, 3)]), np.zeros((2, 0, 2), np.float32)
        )
        assert same(folder.read_box("scalar", (1, 1), [FULL, FULL]), np.full((1, 1), 2.5, np.float32))
        assert list(folder.iter_bytes("zero")) == []
        before = folder.bytes_read
        assert folder.read_box("one", (1, 1), [slice(1, 1), FULL]).shape == (0, 1)
        assert folder.bytes_read == before


def test_a_single_file_of_another_name_and_links_are_taken(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"x": np.arange(3)}, blobs / "0123")
    (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/0123")
    with CheckpointFolder(str(snapshot)) as folder:
        assert folder.read("x").tolist() == [0, 1, 2]
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with CheckpointFolder(snapshot) as folder:
        assert [shard.file for shard in folder.shards] == ["model.safetensors"]


def test_iter_bytes_gives_pieces_in_order(sharded):
    path, arrays = sharded
    with CheckpointFolder(path) as folder:
        pieces = list(folder.iter_bytes("c", 24))
        assert [len(piece) for piece in pieces] == [24, 24, 16]
        assert b"".join(pieces) == arrays["c"].tobytes()
        with pytest.raises(ValueError, match="chunk is 0"):
            folder.iter_bytes("c", 0)


def test_close_releases_the_files_and_reading_then_fails(sharded):
    path, _ = sharded
    folder = CheckpointFolder(path)
    assert open_files(path) == 2
    folder.close()
    folder.close()
    assert open_files(path) == 0
    forgotten = CheckpointFolder(path)
    del forgotten
    assert open_files(path) == 0
    with pytest.raises(ValueError, match="is closed"):
        folder.read("a")


def random_case(rng):
    """A tensor shape, a factorisation of it, and a box."""
    shape, sizes = [], []
    for _ in range(rng.integers(0, 4)):
        factors = [int(size) for size in rng.choice([1, 2, 3, 5, 7], rng.integers(1, 4))]
        shape.append(math.prod(factors))
        sizes += factors
    if rng.random() < 0.3:
        sizes.insert(int(rng.integers(0, len(sizes) + 1)), 1)
    box = []
    for size in sizes:
        start, stop = sorted(int(edge) for edge in rng.integers(0, size + 1, 2))
        box.append(FULL if rng.random() < 0.5 else slice(start, stop))
    return shape, sizes, box


@pytest.mark.parametrize(("buffer", "cost"), [(4 << 20, 64 << 10), (64, 16), (256, 0), (7, 1000)])
def test_boxes_equal_numpy_slices(tmp_path, monkeypatch, buffer, cost):
    """Over buffers and costs that make tiny tensors take every path: runs, covers, pieces of covers."""
    monkeypatch.setattr(reader, "BUFFER_BYTES", buffer)
    monkeypatch.setattr(reader, "READ_COST_BYTES", cost)
    rng = np.random.default_rng(buffer)
    cases = [random_case(rng) for _ in range(250)]
    dtypes = [rng.choice(["bfloat16", "float32", "uint8", "int64"]) for _ in cases]
    arrays = {
        str(i): random_array(rng, shape, getattr(ml_dtypes, dtype, dtype))
        for i, ((shape, _, _), dtype) in enumerate(zip(cases, dtypes, strict=True))
    }
    save_file(arrays, tmp_path / "model.safetensors")
    with CheckpointFolder(tmp_path) as folder:
        for i, (_, sizes, box) in enumerate(cases):
            expected = arrays[str(i)].reshape(sizes)[tuple(box)]
            assert same(folder.read_box(str(i), sizes, box), expected), (sizes, box)


@pytest.mark.parametrize(
    ("sizes", "box"),
    [
        ((6, 1000), [slice(2, 5), FULL]),
        ((2, 3, 1000), [slice(1, 2), FULL, FULL]),
        ((2, 3, 10, 100), [slice(1, 2), slice(2, 3), slice(4, 9), FULL]),
        ((6, 1000), [slice(5, 6), slice(17, 900)]),
    ],
)
def test_contiguous_boxes_read_their_own_bytes_at_once(tmp_path, monkeypatch, sizes, box):
    array = random_array(np.random.default_rng(2), (6, 1000))
    save_file({"x": array}, tmp_path / "model.safetensors")
    with CheckpointFolder(tmp_path) as folder:
        calls = []
        monkeypatch.setattr(reader.os, "preadv", spy(os.preadv, calls))
        result = folder.read_box("x", sizes, box)
        assert same(result, array.reshape(sizes)[tuple(box)])
        assert folder.bytes_read == result.nbytes
        assert len(calls) == 1


def spy(function, calls):
    def wrapped(descriptor, buffers, offset):
        calls.append((offset, sum(len(buffer) for buffer in buffers)))
        return function(descriptor, buffers, offset)

    return wrapped


def test_long_runs_are_read_alone_and_short_ones_together(tmp_path, monkeypatch):
    rows, width = 5, 1 << 18  # rows of 1 MiB
    array = random_array(np.random.default_rng(3), (rows, width))
    save_file({"x": array}, tmp_path / "model.safetensors")
    calls = []
    monkeypatch.setattr(reader.os, "preadv", spy(os.preadv, calls))
    with CheckpointFolder(tmp_path) as folder:
        half = folder.read_box("x", (rows, width), [FULL, slice(width // 2, width)])
        assert same(half, array[:, width // 2 :])
        assert folder.bytes_read == half.nbytes
        assert len(calls) == rows

    narrow = array.reshape(rows * 1024, 256)  # rows of 1 KiB, 5 MiB in all: more than one buffer
    save_file({"x": narrow}, tmp_path / "model.safetensors")
    calls.clear()
    with CheckpointFolder(tmp_path) as folder:
        assert same(folder.read_box("x", narrow.shape, [FULL, slice(3, 100)]), narrow[:, 3:100])
        assert len(calls) == 2
        assert max(size for _, size in calls) <= reader.BUFFER_BYTES
        assert folder.bytes_read < narrow.nbytes


def test_temporary_memory_is_bounded(tmp_path):
    import tracemalloc

    array = np.zeros((32, 1024, 512), np.float32)  # 64 MiB
    save_file({"x": array}, tmp_path / "model.safetensors")
    del array
    with CheckpointFolder(tmp_path) as folder:
        tracemalloc.start()
        out = folder.read_box("x", (32, 1024, 512), [FULL, FULL, slice(0, 8)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < out.nbytes + reader.BUFFER_BYTES + (1 << 20)


def test_many_threads_read_at_once(tmp_path):
    array = random_array(np.random.default_rng(4), (64, 300), np.int64)
    save_file({"x": array}, tmp_path / "model.safetensors")
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            low, high = sorted(rng.integers(0, 300, 2))
            if not same(folder.read_box("x", (64, 300), [FULL, slice(low, high)]), array[:, low:high]):
                failures.append(seed)

    with CheckpointFolder(tmp_path) as folder:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("sizes", [(5, 3), (15,), (3, 5, 2), (3, 6), (3,), (3, 0), (), (-3, -5), (3, -5)])
def test_sizes_that_do_not_factor_the_shape_are_refused(sharded, sizes):
    with CheckpointFolder(sharded[0]) as folder, pytest.raises(UserError, match=r"'a' has shape \(3, 5\)"):
        folder.read_box("a", sizes, [FULL] * len(sizes))


def test_bad_boxes_names_and_outputs_are_refused(sharded):
    with CheckpointFolder(sharded[0]) as folder:
        for box in (
            [FULL],
            [FULL, slice(0, 6)],
            [slice(-1, 2), FULL],
            [slice(2, 1), FULL],
            [FULL, slice(0, 4, 2)],
        ):
            with pytest.raises(ValueError, match="expected"):
                folder.read_box("a", (3, 5), box)
        for method in (folder.read, folder.iter_bytes):
            with pytest.raises(UserError, match=r"no tensor 'model\.e' among its 4"):
                method("model.e")


def test_short_reads_are_continued(sharded, monkeypatch):
    """The kernel may give less than was asked for, as it does beyond 2 GiB."""
    path, arrays = sharded
    preadv = os.preadv
    monkeypatch.setattr(reader.os, "preadv", lambda number, buffers, at: preadv(number, [buffers[0][:7]], at))
    with CheckpointFolder(path) as folder:
        assert same(folder.read("c"), arrays["c"])
        assert folder.bytes_read == arrays["c"].nbytes


def test_a_file_that_shrinks_while_open_is_reported(sharded):
    with CheckpointFolder(sharded[0]) as folder:
        os.truncate(sharded[0] / "model-00002-of-00002.safetensors", 150)
        with pytest.raises(UserError, match=r"00002\.safetensors: ends before byte"):
            folder.read("b")
