"""Writing files as the safetensors library and transformers do, and folders all or nothing."""

import errno
import json
import os
import re
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from jaxmoe.errors import UserError
from jaxmoe.interop.storage import writer as writer_module
from jaxmoe.interop.storage.format import DTYPES, INDEX_FILE, dtype_name, new_shard
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.writer import FolderWriter, index_json, plan_shards, write_shard


def described(arrays):
    return [(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def arrays():
    """A tensor of every dtype that numpy holds, names against the dtype order; some empty, some scalars."""
    rng = np.random.default_rng(0)
    result = {}
    for number, (name, entry) in enumerate(DTYPES.items()):
        if entry.numpy is not None:
            shape = (number % 4, 3) if number % 5 else ()
            result[f"{number * 7 % 23}.{name}"] = rng.integers(0, 2, shape).astype(entry.numpy)
    return result | {"zulu": np.ones((2, 3), np.float32), "alpha": np.zeros((5,), np.float32)}


# Files


def test_a_fresh_file_is_the_library_s_own(tmp_path, arrays):
    arrays |= {'é"\\/\x7f': np.ones(2, np.int16), "\x01\n\u2028😀": np.ones(3, np.int16)}
    for metadata in ({"format": "pt"}, {}, None):
        shard = new_shard("model.safetensors", described(arrays), metadata)
        path = tmp_path / f"{metadata}.safetensors"
        write_shard(path, shard, lambda info: arrays[info.name])
        assert path.read_bytes() == save(arrays, metadata)
        assert shard.file_bytes == path.stat().st_size


def test_metadata_is_that_of_transformers_by_default(arrays):
    (shard,) = plan_shards(described(arrays), 1 << 30)
    assert shard.metadata == {"format": "pt"}
    assert shard.header.startswith(b'{"__metadata__":{"format":"pt"},')


def test_a_folder_is_repeated_byte_for_byte(tmp_path, arrays):
    """Headers in any key order, spacing and padding; types below a byte; by arrays, bytes and streams."""
    source = tmp_path / "source"
    source.mkdir()
    save_file(arrays, source / "b.safetensors", {"format": "pt"})
    entries = {
        "late": {"data_offsets": [4, 8], "shape": [8], "dtype": "F4"},
        "empty": {"shape": [0], "dtype": "F32", "data_offsets": [4, 4]},
        "early": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "note": "kept"},
    }
    header = (json.dumps(entries, indent=1) + " \n ").encode()
    (source / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcdefgh")
    places = dict.fromkeys(arrays, "b.safetensors") | dict.fromkeys(entries, "a.safetensors")
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": places}))

    with CheckpointFolder(source) as folder, FolderWriter(tmp_path / "target") as writer:
        assert [info.name for info in folder.shards[0].tensors] == ["early", "empty", "late"]
        writer.shard(folder.shards[0], lambda info: folder.iter_bytes(info.name, 3))
        writer.shard(folder.shards[1], lambda info: folder.read(info.name))
        writer.copy(source / INDEX_FILE, INDEX_FILE)
    assert contents(tmp_path / "target") == contents(source)

    with CheckpointFolder(source) as folder:
        for shard in folder.shards:
            write_shard(tmp_path / shard.file, shard, lambda info: folder.iter_bytes(info.name))
            assert (tmp_path / shard.file).read_bytes() == (source / shard.file).read_bytes()


def test_arrays_of_any_strides_are_written_in_order(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    (shard,) = plan_shards([("x", "I32", (4, 3, 2))], 1000)
    write_shard(tmp_path / "x", shard, lambda _: array.T)
    assert (load_file(tmp_path / "x")["x"] == array.T).all()


@pytest.mark.parametrize(
    "data",
    [bytes(24), bytearray(24), np.zeros((2, 3), np.float32).data, iter([np.zeros((0, 3)).data, bytes(24)])],
)
def test_bytes_of_any_kind_are_written(tmp_path, data):
    shard = new_shard("x", [("x", "F32", (2, 3)), ("y", "F32", (0, 3))], None)
    write_shard(
        tmp_path / "x", shard, lambda info: data if info.nbytes else np.zeros((0, 3), np.float32).data
    )
    assert (tmp_path / "x").read_bytes() == shard.prefix + bytes(24)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.zeros((3, 2), np.float32), ValueError, r"'x': fetched float32 \(3, 2\), expected F32 \(2, 3\)"),
        (np.zeros((2, 3), np.int32), ValueError, r"'x': fetched int32 \(2, 3\), expected F32"),
        (np.zeros((2, 3), ">f4"), ValueError, "'x': fetched >f4"),
        (bytes(23), ValueError, "'x': fetched 23, fewer than its 24 bytes"),
        (bytes(25), ValueError, "'x': fetched more than its 24 bytes"),
        (iter([bytes(20), bytes(3)]), ValueError, "'x': fetched 23, fewer"),
        (iter([bytes(20), bytes(5)]), ValueError, "'x': fetched more"),
        (iter([]), ValueError, "'x': fetched 0, fewer"),
        ([bytes(24)], TypeError, "'x': fetched list, expected an array"),
        (None, TypeError, "'x': fetched NoneType"),
    ],
)
def test_wrong_data_is_refused_and_leaves_no_file(tmp_path, data, error, message):
    (shard,) = plan_shards([("x", "F32", (2, 3))], 1000)
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "x", shard, lambda _: data)
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_not_touched(tmp_path):
    (tmp_path / "x").write_bytes(b"before")
    (shard,) = plan_shards([("x", "F32", (2, 3))], 1000)
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "x", shard, lambda _: bytes(24))
    assert (tmp_path / "x").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("limit", "want"),
    [
        (1, ["a", "b", "c", "d"]),
        (19, ["b", "ac", "d"]),  # b is larger than a file may be, and leaves the open one
        (20, ["a", "b", "cd"]),
        (27, ["a", "bc", "d"]),
        (28, ["ab", "cd"]),
        (46, ["abcd"]),
    ],
)
def test_a_file_is_closed_where_the_next_tensor_would_take_it_over_the_limit(limit, want):
    sizes = {"a": 8, "b": 20, "c": 7, "d": 11}
    shards = plan_shards([(name, "U8", (size,)) for name, size in sizes.items()], limit)
    assert ["".join(sorted(info.name for info in shard.tensors)) for shard in shards] == want
    count = f"{len(want):05d}"
    several = [f"model-{number:05d}-of-{count}.safetensors" for number in range(1, len(want) + 1)]
    assert [shard.file for shard in shards] == (several if len(want) > 1 else ["model.safetensors"])
    index = json.loads(index_json(shards))
    assert index["weight_map"] == {info.name: shard.file for shard in shards for info in shard.tensors}
    assert index["metadata"]["total_size"] == 46


def test_index_form():
    shards = plan_shards([("b", "BF16", (2, 3)), ("a.é", "F32", (5,)), ("c", "F32", ())], 22)
    assert index_json(shards).decode() == textwrap.dedent(
        """\
        {
          "metadata": {
            "total_parameters": 12,
            "total_size": 36
          },
          "weight_map": {
            "a.\\u00e9": "model-00002-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors"
          }
        }
        """
    )


@pytest.mark.parametrize(
    ("tensors", "limit", "message"),
    [
        ([], 10, "0 tensors"),
        ([("x", "F32", (2,))], 0, "shards of 0 bytes"),
        ([("x", "F32", (2,)), ("x", "I8", (2,))], 4, "1 tensor names are repeated"),
        ([("__metadata__", "F32", (2,))], 10, "'__metadata__' is reserved"),
        ([("x", "float32", (2,))], 10, "unknown dtype 'float32'"),
        ([("x", "F4", (3,))], 10, "12 bits"),
        ([("x", "F32", (-2, -2))], 100, "not negative"),
    ],
)
def test_plans_that_cannot_be_written(tensors, limit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_shards(tensors, limit)


def test_types_below_a_byte_can_be_planned():
    shard = new_shard("x", [("a", "F6_E2M3", (4, 3)), ("b", "F4", (2,))], None)
    assert [(info.name, info.nbytes) for info in shard.tensors] == [("a", 9), ("b", 1)]


def test_unknown_dtypes_have_no_name():
    with pytest.raises(ValueError, match="dtype float4_e2m1fn cannot be stored"):
        dtype_name(ml_dtypes.float4_e2m1fn)


@pytest.mark.torch
def test_transformers_writes_the_same_folder(tmp_path):
    pytest.importorskip("torch")
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path, max_shard_size=20_000)
    with CheckpointFolder(tmp_path) as folder:
        assert len(folder.shards) > 2
        assert index_json(folder.shards) == (tmp_path / INDEX_FILE).read_bytes()
        for shard in folder.shards:
            tensors = [(info.name, info.dtype, info.shape) for info in shard.tensors]
            assert new_shard(shard.file, reversed(tensors), shard.metadata) == shard


# Folders


def make_checkpoint(folder, value):
    folder.mkdir(parents=True)
    save_file({"x": np.full(3, value, np.float32)}, folder / "model.safetensors")
    (folder / "note.txt").write_text("mine")
    return contents(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path, arrays):
    shards = plan_shards(described(arrays), 30)
    target = tmp_path / "deep" / "out"
    source = tmp_path / "tokenizer"
    source.write_bytes(b"tokens")
    (tmp_path / "link").symlink_to(source)
    with FolderWriter(str(target)) as writer:
        for shard in shards:
            writer.shard(shard, lambda info: arrays[info.name])
        writer.file(INDEX_FILE, index_json(shards))
        writer.copy(tmp_path / "link", "sub/folder/tokenizer.json")
        writer.file("sub/empty", b"")
        assert not target.exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (target / "sub/folder/tokenizer.json").read_bytes() == b"tokens"
    assert not (target / "sub/folder/tokenizer.json").is_symlink()
    assert (target / "sub/empty").read_bytes() == b""
    with CheckpointFolder(target) as folder:
        for name, array in arrays.items():
            assert (folder.read(name) == array).all()


def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with FolderWriter(tmp_path / "out") as writer:
        writer.file("a", b"")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), FolderWriter(tmp_path / "new" / "deep" / "out") as writer:  # noqa: PT012
        writer.file("sub/a", b"1")
        assert names(tmp_path) == ["new"]
        raise error
    assert names(tmp_path) == []


def test_a_failing_fetch_leaves_nothing(tmp_path):
    def fetch(info):
        if info.name == "b":
            raise RuntimeError("device lost")
        return bytes(info.nbytes)

    (shard,) = plan_shards([("a", "F32", (3,)), ("b", "F32", (3,))], 100)
    with pytest.raises(RuntimeError, match="device lost"), FolderWriter(tmp_path / "out") as writer:
        writer.shard(shard, fetch)
    assert names(tmp_path) == []


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with FolderWriter(tmp_path / "out") as writer:
        writer.file("a", b"1")
    assert contents(tmp_path) == {"out/a": b"1"}


def test_targets_that_are_refused(tmp_path):
    before = make_checkpoint(tmp_path / "full", 1)
    with pytest.raises(UserError, match="full: is not empty"):
        FolderWriter(tmp_path / "full")
    assert contents(tmp_path / "full") == before
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    with pytest.raises(UserError, match="work: holds no checkpoint, and overwriting would delete"):
        FolderWriter(tmp_path / "work", overwrite=True)
    with pytest.raises(UserError, match=r"thesis.tex: is a file"):
        FolderWriter(tmp_path / "work" / "thesis.tex", overwrite=True)
    with pytest.raises(UserError, match="expected a new folder"):
        FolderWriter("/", overwrite=True)
    with pytest.raises(UserError, match=r"cannot write the folder: Not a directory"):
        FolderWriter(tmp_path / "work" / "thesis.tex" / "out").__enter__()
    assert names(tmp_path) == ["full", "work"]


def test_a_target_filled_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="is not empty"), FolderWriter(tmp_path / "out") as writer:  # noqa: PT012
        writer.file("a", b"1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "b").touch()
    assert contents(tmp_path) == {"out/b": b""}


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "out"
    before = make_checkpoint(target, 1)
    with pytest.raises(RuntimeError), FolderWriter(target, overwrite=True) as writer:  # noqa: PT012
        writer.file("a", b"1")
        assert contents(target) == before
        raise RuntimeError
    assert contents(target) == before
    assert names(tmp_path) == ["out"]
    with FolderWriter(target, overwrite=True) as writer:
        writer.file("a", b"1")
        assert contents(target) == before
    assert contents(tmp_path) == {"out/a": b"1"}


def test_overwriting_puts_the_old_folder_back_if_the_swap_fails(tmp_path, monkeypatch):
    target = tmp_path / "out"
    before = make_checkpoint(target, 1)
    rename = writer_module.Path.rename

    def failing(path, destination):
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, destination)

    monkeypatch.setattr(writer_module.Path, "rename", failing)
    with (
        pytest.raises(UserError, match="Input/output error"),
        FolderWriter(target, overwrite=True) as writer,
    ):
        writer.file("a", b"1")
    assert contents(target) == before
    assert names(tmp_path) == ["out"]


def test_a_folder_can_be_exported_onto_itself(tmp_path):
    target = tmp_path / "out"
    before = make_checkpoint(target, 1)
    (tmp_path / "link").symlink_to("out")
    with CheckpointFolder(target) as folder, FolderWriter(tmp_path / "link", overwrite=True) as writer:
        writer.shard(folder.shards[0], lambda info: folder.read(info.name) * 2)
        writer.copy(target / "note.txt", "note.txt")
    assert (load_file(target / "model.safetensors")["x"] == 2).all()
    assert contents(target)["note.txt"] == before["note.txt"]
    assert names(tmp_path) == ["link", "out"]


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "b/../../a", "", ".", "..", "a\0"])
def test_names_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "source").touch()
    with FolderWriter(tmp_path / "out") as writer:
        for write in (lambda: writer.file(name, b""), lambda: writer.copy(tmp_path / "source", name)):
            with pytest.raises(UserError, match="leaves the folder"):
                write()
        shard = new_shard(name, [("x", "U8", (1,))], None)
        with pytest.raises(UserError, match="leaves the folder"):
            writer.shard(shard, lambda _: b"1")
    assert contents(tmp_path) == {"source": b""}


def test_mistakes_in_use(tmp_path):
    with FolderWriter(tmp_path / "out") as writer:
        writer.file("a", b"1")
        with pytest.raises(ValueError, match="'a' is written twice"):
            writer.file("a", b"2")
        with pytest.raises(UserError, match="absent: cannot be read: No such file"):
            writer.copy(tmp_path / "absent", "b")
        with pytest.raises(UserError, match=r"cannot write a/b \(1 bytes\)"):
            writer.file("a/b", b"2")
    with pytest.raises(RuntimeError, match="outside its with block"):
        writer.file("b", b"1")
    assert contents(tmp_path) == {"out/a": b"1"}


def test_only_one_process_exports_to_a_target(tmp_path):
    with FolderWriter(tmp_path / "out") as writer:
        writer.file("a", b"1")
        held = r"out: in use by process \d+ on .*: wait for it to end or choose another folder"
        with pytest.raises(UserError, match=held):
            FolderWriter(tmp_path / "out").__enter__()
    assert contents(tmp_path) == {"out/a": b"1"}


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_a_killed_export_left_is_cleared(tmp_path):
    killed = run(
        """
        import os, signal, sys
        from jaxmoe.interop.storage.writer import FolderWriter
        with FolderWriter(sys.argv[1]) as writer:
            writer.file("sub/a", b"1")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "out",
    )
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2  # the temporary folder and the lock
    bystander = tmp_path / ".out.tmp-of-mine"
    bystander.mkdir()
    with FolderWriter(tmp_path / "out") as writer:
        writer.file("b", b"2")
    assert names(tmp_path) == [".out.tmp-of-mine", "out"]
    assert contents(tmp_path) == {"out/b": b"2"}


def test_an_overwrite_killed_between_its_renames_loses_nothing(tmp_path):
    before = make_checkpoint(tmp_path / ".out.old-0123abcd", 1)
    with pytest.raises(UserError, match="out: is not empty"):
        FolderWriter(tmp_path / "out").__enter__()
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]
    make_checkpoint(tmp_path / ".out.old-0123abcd", 2)  # killed after both: the old one is to go
    with FolderWriter(tmp_path / "out", overwrite=True) as writer:
        assert contents(tmp_path / "out") == before
        writer.file("a", b"1")
    assert contents(tmp_path) == {"out/a": b"1"}


@pytest.mark.parametrize("action", ["shard", "file", "copy"])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, action):
    """A limit on the size of files stands in for the disk: the same error path as ENOSPC, by EFBIG."""
    (tmp_path / "source").write_bytes(bytes(80_000))
    result = run(
        """
        import resource, signal, sys
        from jaxmoe.errors import UserError
        from jaxmoe.interop.storage.writer import FolderWriter, plan_shards
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        folder, source, action = sys.argv[1:]
        (shard,) = plan_shards([("a", "F32", (10_000,)), ("b", "F32", (10_000,))], 1 << 20)
        try:
            with FolderWriter(folder) as writer:
                writer.file("small", b"fits")
                if action == "shard":
                    writer.shard(shard, lambda info: bytes(info.nbytes))
                elif action == "file":
                    writer.file("large", bytes(80_000))
                else:
                    writer.copy(source, "large")
        except UserError as error:
            print(error)
        """,
        tmp_path / "out",
        tmp_path / "source",
        action,
    )
    assert result.stderr == ""
    what = r"model.safetensors \(80,1\d\d bytes\)" if action == "shard" else r"large \(80,000 bytes\)"
    expected = (
        "cannot write {}: File too large; nothing was left behind, free some space or choose another folder\n"
    )
    assert re.fullmatch(re.escape(f"{tmp_path}/out: ") + expected.format(what), result.stdout)
    assert names(tmp_path) == ["source"]


def test_no_space_left_is_reported(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "No space left on device; nothing was left behind, free some space"
    with pytest.raises(UserError, match=message), FolderWriter(tmp_path / "out") as writer:  # noqa: PT012
        monkeypatch.setattr(os, "fsync", full)
        writer.file("a", b"1")
    assert names(tmp_path) == []
