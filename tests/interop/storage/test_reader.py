"""CheckpointFolder: reading boxes of tensors, and refusing folders that are damaged."""

import json
import math
import os
import struct
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from jaxmoe.errors import UserError
from jaxmoe.interop.storage import reader
from jaxmoe.interop.storage.format import DTYPES, INDEX_FILE, dtype_name, is_inside, raise_problems
from jaxmoe.interop.storage.reader import CheckpointFolder

FULL = slice(None)


def random_array(rng, shape, dtype="float32"):
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return (raw[..., 0] & 1).astype(bool) if dtype.kind == "b" else raw.view(dtype).reshape(shape)


def same(actual, expected):
    """Equality of bits, so that NaNs count as equal and dtypes as different."""
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()
    )


def write_raw(path, header, data=b"", length=None):
    """A file with any header (an object, or bytes) and any announced length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        CheckpointFolder(folder)
    return str(caught.value)


def open_files(path):
    links = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return sum(link.is_relative_to(path) for link in links)


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards; returns it and its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "a": random_array(rng, (3, 5), ml_dtypes.bfloat16),
        "b": random_array(rng, (7,)),
        "c": random_array(rng, (2, 4), np.int64),
        "d": random_array(rng, (6,), np.uint8),
    }
    save_file(
        {name: arrays[name] for name in "ad"}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    save_file({name: arrays[name] for name in "bc"}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(
        tmp_path, {name: f"model-0000{1 if name in 'ad' else 2}-of-00002.safetensors" for name in arrays}
    )
    return tmp_path, arrays


# What is in a folder


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


# Boxes


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


# Folders that are refused


def test_paths_without_a_checkpoint(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert f"is a file, expected a folder; give the folder that holds it, {tmp_path}" in refusal(
        tmp_path / "file.safetensors"
    )
    (tmp_path / "empty").mkdir()
    assert "no safetensors files; expected model.safetensors.index.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    (tmp_path / "empty" / "consolidated.00.pth").touch()
    message = refusal(tmp_path / "empty")
    assert "found consolidated.00.pth, pytorch_model.bin: convert to safetensors" in message


def test_shards_without_an_index(sharded):
    (sharded[0] / INDEX_FILE).unlink()
    assert "2 safetensors files (model-00001-of-00002.safetensors, model-00002-of-00002" in refusal(
        sharded[0]
    )


def test_an_index_beside_another_single_file(sharded):
    save_file({"z": np.zeros(1)}, sharded[0] / "model.safetensors")
    assert "two checkpoints in one folder" in refusal(sharded[0])


def test_all_missing_shards_are_named_at_once(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "m-1.safetensors")
    (tmp_path / "m-3.safetensors").symlink_to("../blobs/gone")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"})
    message = refusal(tmp_path)
    assert "2 of the 3 shards" in message
    assert "missing: m-2.safetensors, m-3.safetensors;" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'{"weight_map": {"a": "\xff"}}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' appears twice"),
    ],
)
def test_damaged_indices(tmp_path, text, expected):
    (tmp_path / INDEX_FILE).write_bytes(text)
    message = refusal(tmp_path)
    assert f"{INDEX_FILE}: " in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "y/x.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        5,
        ["x"],
        None,
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "y").mkdir(parents=True)
    for place in (tmp_path, folder / "y"):
        save_file({"a": np.zeros(2)}, place / "x.safetensors")
    write_index(folder, {"a": str(tmp_path / "x.safetensors") if name == "/x.safetensors" else name})
    assert "expected the plain name of a safetensors file" in refusal(folder)


def test_is_inside():
    assert all(map(is_inside, ["a", "a/b", "a..b", "./a", "..a", "a\\b", "..\\a"]))
    assert not any(map(is_inside, ["", ".", "/", "/a", "..", "a/..", "a/../b", "../a", "//a", "a\0"]))


def test_index_and_shards_that_disagree_are_reported_together(sharded):
    path, arrays = sharded
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": arrays["a"], "b": arrays["b"], "extra": arrays["d"]}, path / first)
    write_index(path, {"a": second, "b": second, "c": second, "d": first, "e": second})
    assert refusal(path).removeprefix(f"{path}: 5 problems: ").split("; ") == [
        f"tensor 'b' is stored more than once, in {first}, {second}",
        "expected one file",
        f"{first}: holds tensor 'a', which {INDEX_FILE} places in '{second}'",
        f"{first}: holds tensor 'extra', which {INDEX_FILE} does not name",
        f"{first}: lacks tensor 'd', which {INDEX_FILE} places there",
        f"{second}: lacks tensor 'e', which {INDEX_FILE} places there",
    ]


def test_problems_that_differ_in_numbers_of_a_name_are_told_once():
    def told(problems):
        with pytest.raises(UserError) as caught:
            raise_problems("here", problems)
        return str(caught.value)

    many = [f"layers.{layer}.experts.{e}.up is missing" for layer in range(3) for e in range(5)]
    assert told(many[:1]) == "here: layers.0.experts.0.up is missing"
    assert told([*many, "other", *many]) == (
        "here: 31 problems: layers.{0..2}.experts.{0..4}.up is missing (15 tensors); other"
    )
    without = [problem for problem in many if problem not in (many[2], many[11])]  # (0, 2) and (2, 1)
    assert told(without) == (
        "here: 13 problems: layers.0.experts.{0..1,3..4}.up is missing (4 tensors); "
        "layers.1.experts.{0..4}.up is missing (5 tensors); layers.2.experts.{0,2..4}.up is missing (4 tensors)"
    )
    assert told(["a.1.b is [3, 4]", "a.2.b is [4, 4]", "model-00001.safetensors", "a.01.b"]) == (
        "here: 4 problems: a.1.b is [3, 4]; a.2.b is [4, 4]; model-00001.safetensors; a.01.b"
    )


def test_names_that_are_all_different_are_all_told_up_to_a_thousand(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    for count, told in ((33, 33), (1033, 1000)):
        write_index(tmp_path, {"a": "x.safetensors"} | {f"t{i}": "x.safetensors" for i in range(count)})
        message = refusal(tmp_path)
        assert "\n" not in message
        assert message.startswith(f"{tmp_path}: {count} problems: ")
        assert message.count("lacks tensor") == told
        assert message.endswith("; and 33 more") == (count > told)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **changes):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | changes


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"a": \xff}', "header is damaged: not UTF-8"),
        (b"\0" * 16, "header is damaged: not JSON"),
        (b"", "header is damaged: not JSON"),
        (b"[1]", "header is damaged: holds [1], expected a JSON object"),
        (b'{"__metadata__": {"x": NaN}}', "header is damaged: NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', "header is damaged: key 'a' appears twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header is damaged"),
        ({"__metadata__": {"x": 1}}, "__metadata__ is {'x': 1}, expected an object of strings"),
        ({"__metadata__": "x"}, "__metadata__ is 'x', expected an object of strings"),
        ({"a": 3}, "tensor 'a': is described by 3"),
        ({"a": {}}, "tensor 'a': unknown dtype None"),
        ({"a": entry("F33")}, "tensor 'a': unknown dtype 'F33', expected one of BOOL, F4"),
        ({"a": entry(dtype=["F32"])}, "tensor 'a': unknown dtype ['F32']"),
        ({"a": entry(shape=(-2, -3))}, "tensor 'a': shape [-2, -3], expected"),
        ({"a": entry(shape=(2.0, 3))}, "tensor 'a': shape [2.0, 3], expected"),
        ({"a": entry(shape=(True, 6))}, "tensor 'a': shape [True, 6], expected"),
        ({"a": entry(shape=[1] * 65)}, "tensor 'a': shape [1, 1,"),
        ({"a": entry(shape=(2**62, 0), offsets=(0, 0))}, "too large to address"),
        ({"a": entry(data_offsets=[0])}, "tensor 'a': data_offsets [0], expected two"),
        ({"a": entry(data_offsets=[-24, 0])}, "tensor 'a': data_offsets [-24, 0], expected two"),
        ({"a": entry(data_offsets=[24, 0])}, "bytes 24 to 0 are -24 bytes"),
        ({"a": entry(shape=(2, 2))}, "bytes 0 to 24 are 24 bytes, but F32 of shape [2, 2] takes 16"),
        ({"a": entry("F4", (3,), (0, 2))}, "shape [3] of F4 is 12 bits, expected whole bytes"),
        (
            {"a": entry(shape=(4,), offsets=(8, 24))},
            "tensor 'a' starts at byte 8 of the data, expected 0: it leaves a hole",
        ),
        (
            {"a": entry(shape=(3,), offsets=(0, 12)), "b": entry(shape=(4,), offsets=(8, 24))},
            "tensor 'b' starts at byte 8 of the data, expected 12: it overlaps",
        ),
        ({"a": entry(shape=(3,), offsets=(0, 12))}, "12 trailing bytes after the last tensor"),
        ({}, "24 trailing bytes after the last tensor"),
        ({"a": entry(shape=(2, 4), offsets=(0, 32))}, "truncated: the header describes"),
    ],
)
def test_damaged_headers(tmp_path, header, expected):
    write_raw(tmp_path / "model.safetensors", header, bytes(24))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: model.safetensors: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"12345", "has 5 bytes, too few"),
        (struct.pack("<Q", 9) + b"{}", "announces a header of 9 bytes, a file of 10; truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9,223,372,036,854,775,808 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ],
)
def test_files_without_a_header(tmp_path, content, expected):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert expected in refusal(tmp_path)


def test_a_header_over_the_limit(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    assert "header of 100,000,001 bytes, at most 100,000,000, in a file of 100,000,100" in refusal(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    content = save({"a": np.arange(6, dtype=np.float32), "b": np.arange(3, dtype=np.int8)})
    path = tmp_path / "model.safetensors"
    for size in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:size])
        refusal(tmp_path)


def test_unreadable_files_are_reported(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors: cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "model.safetensors: is empty" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("gone")
    assert "model.safetensors: cannot be read: No such file" in refusal(tmp_path)


def test_problems_of_several_shards_are_collected(sharded):
    path, _ = sharded
    for file in path.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size - 1)
    message = refusal(path)
    assert "2 problems" in message
    assert message.count("truncated") == 2


def test_a_refused_folder_leaves_no_file_open(sharded):
    path, _ = sharded
    (path / "model-00002-of-00002.safetensors").write_bytes(b"")
    refusal(path)
    assert open_files(path) == 0
