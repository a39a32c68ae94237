"""CheckpointFolder refuses folders that are damaged, and says everything that is wrong."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
from helpers.files import open_files, write_index, write_raw
from safetensors.numpy import save, save_file

from jaxmoe.errors import UserError
from jaxmoe.interop.storage import format as format_module
from jaxmoe.interop.storage import index as index_module
from jaxmoe.interop.storage.format import INDEX_FILE, is_inside
from jaxmoe.interop.storage.problems import MAX_TOLD, raise_problems
from jaxmoe.interop.storage.reader import CheckpointFolder


def refusal(folder):
    with pytest.raises(UserError) as caught:
        CheckpointFolder(folder)
    return str(caught.value)


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
        "y/../../x.safetensors",
        "/x.safetensors",
        "a\0.safetensors",
        "\ud800.safetensors",
        "..",
        ".",
        "",
        "y",
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
    assert "expected a safetensors file in this folder or below it" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n" * 300 + ".safetensors", "nnn...: cannot be read: File name too long"),
        ("n/" * 3000 + "x.safetensors", "n/n...: cannot be read: File name too long"),
        ("folder.safetensors", "folder.safetensors: cannot be read: Is a directory"),
        (
            "file/x.safetensors",
            "1 of the 1 shards that model.safetensors.index.json names are missing: file/x",
        ),
    ],
)
def test_names_at_which_no_file_can_be(tmp_path, name, expected):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    write_index(tmp_path, {"a": name})
    message = refusal(tmp_path)
    assert expected in message
    assert len(message) < len(str(tmp_path)) + MAX_TOLD


@pytest.mark.parametrize("kind", ["a pipe", "a link to a device"])
def test_what_is_no_regular_file_is_not_opened(sharded, kind):
    folder, _ = sharded

    def replace(path):
        path.unlink()
        if kind == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")

    named = "it is a named pipe" if kind == "a pipe" else "it is a character device"
    replace(folder / "model-00002-of-00002.safetensors")
    assert f"model-00002-of-00002.safetensors: cannot be read: {named}, expected a regular file" in refusal(
        folder
    )
    replace(folder / INDEX_FILE)
    assert refusal(folder) == f"{folder / INDEX_FILE}: cannot be read: {named}, expected a regular file"


def test_is_inside():
    assert all(map(is_inside, ["a", "a/b", "a..b", "./a", "..a", "a\\b", "..\\a", "\udcff"]))
    assert not any(
        map(is_inside, ["", ".", "/", "/a", "..", "a/..", "a/../b", "../a", "//a", "a\0", "\ud800"])
    )


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


def test_a_message_is_of_readable_length(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    for count in (11, 20_000):
        write_index(tmp_path, {"a": "x.safetensors"} | {f"t{i}": "x.safetensors" for i in range(count)})
        message = refusal(tmp_path)
        assert "\n" not in message
        assert message.startswith(f"{tmp_path}: {count:,} problems: ")
        told = message.count("lacks tensor")
        assert told == 11 or message.endswith(f"; and {count - told:,} more")
        assert 800 < len(message) - len(str(tmp_path)) < MAX_TOLD + 60


@pytest.mark.parametrize("length", [MAX_TOLD, MAX_TOLD + 1])
def test_one_long_problem_is_cut(length):
    with pytest.raises(UserError) as caught:
        raise_problems("here", ["x" * length])
    assert str(caught.value) == "here: " + (
        "x" * length if length == MAX_TOLD else "x" * (length - 4) + "..."
    )


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
    assert "model.safetensors: cannot be read: it is a named pipe" in refusal(tmp_path)
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


def peak_bytes(call):
    """Of Python's own memory while something is done."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'"t%d":1', "it holds 160,000 keys and values, expected at most 10,016"),
        (b'"t%d":"[[[,,,::: %d"', "keys and values, expected at most 10,016"),
        (b'"t%d":{}', "it describes 80,001 tensors, expected at most 20,000"),
        (b'"t%d":{"dtype":"F32","shape":[1,2]}', "it describes 80,001 tensors, expected at most 20,000"),
        (b'"t%d":[[],[],[]]', "keys and values, expected at most 10,016"),
    ],
)
def test_a_header_of_too_much_is_refused_before_it_is_parsed(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(format_module, "MAX_TENSORS", 20_000)
    monkeypatch.setattr(format_module, "_VALUES_OF_METADATA", 10_000)
    entries = b",".join(text.replace(b"%d", b"%d" % i) for i in range(80_000))
    write_raw(tmp_path / "model.safetensors", b"{" + entries + b"}")
    messages = []
    peak = peak_bytes(lambda: messages.append(refusal(tmp_path)))
    assert peak < 1.5 * len(entries) + 1_000_000
    assert "model.safetensors: header is damaged: " in messages[0]
    assert expected in messages[0]


def test_a_header_of_many_wrong_entries(tmp_path):
    entries = b",".join(b'"t%d":{"dtype":"F32"}' % i for i in range(3000))
    write_raw(tmp_path / "model.safetensors", b"{" + entries + b"}")
    message = refusal(tmp_path)
    assert "1,001 problems: model.safetensors: header is damaged: 1,000 tensors or more" in message
    assert "; download it again; model.safetensors: tensor 't0': shape None" in message
    assert message.endswith(" more")
    assert len(message) < len(str(tmp_path)) + MAX_TOLD + 100


def test_an_index_of_too_many_entries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_VALUES", 1000)
    write_index(tmp_path, {f"t{i}": "x.safetensors" for i in range(1000)})
    assert "damaged: it holds 2,005 keys and values, expected at most 1,000" in refusal(tmp_path)
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(100_000_001)
    assert "cannot be read: it has 100,000,001 bytes, expected at most 100,000,000" in refusal(tmp_path)
