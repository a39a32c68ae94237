"""Folders appear whole or not at all, whatever fails meanwhile."""

import errno
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers.files import contents, described
from safetensors.numpy import load_file, save_file

from jaxmoe.errors import UserError
from jaxmoe.interop.storage import writer as writer_module
from jaxmoe.interop.storage.format import INDEX_FILE, new_shard
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.writer import FolderWriter, index_json, plan_shards


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
