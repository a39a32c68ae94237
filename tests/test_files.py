import contextlib
import errno
import fcntl
import os
import shutil

import pytest

from jaxmoe import files
from jaxmoe.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path):
    descriptor = files.lock(tmp_path / "lock", "the folder")
    with pytest.raises(UserError) as caught:
        files.lock(tmp_path / "lock", "the folder")
    assert str(caught.value).startswith(f"the folder: in use by process {os.getpid()} on ")
    assert str(caught.value).endswith(": wait for it to end or choose another folder")
    os.close(descriptor)
    os.close(files.lock(tmp_path / "lock", "the folder"))


def test_a_lock_file_removed_while_waiting_is_made_again(tmp_path, monkeypatch):
    """Its holder removes the file between this process's opening and locking it."""
    original, removed = fcntl.flock, []

    def flock(descriptor, operation):
        if not removed:
            removed.append(True)
            (tmp_path / "lock").unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = files.lock(tmp_path / "lock", "the folder")
    with pytest.raises(UserError, match="in use"):
        files.lock(tmp_path / "lock", "the folder")
    os.close(descriptor)


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(
        UserWarning, match=r"lock: this file system has no locks \(Operation not supported\); see"
    ):
        os.close(files.lock(tmp_path / "lock", "the folder"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("moment", "want"), [("fsync of the file", "old"), ("rename", "old"), ("fsync of the folder", "new")]
)
def test_a_write_that_is_killed_leaves_the_old_content_or_the_new(tmp_path, monkeypatch, moment, want):
    path = tmp_path / "a"
    path.write_text("old")
    happened = []

    def at(name, action):
        def run(*arguments):
            happened.append(name)
            if name == moment:
                raise Killed
            return action(*arguments)

        return run

    monkeypatch.setattr(os, "fsync", at("fsync of the file", os.fsync))
    monkeypatch.setattr(files.Path, "replace", at("rename", files.Path.replace))
    monkeypatch.setattr(files, "sync_folder", at("fsync of the folder", files.sync_folder))
    with pytest.raises(Killed):
        files.write_atomically(path, "new")
    assert happened[-1] == moment
    monkeypatch.undo()
    assert path.read_text() == want
    files.write_atomically(path, "newest")
    assert (path.read_text(), names(tmp_path)) == ("newest", ["a"])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space or choose another folder"), (errno.EIO, "choose another folder")],
)
def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch, number, remedy):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError) as caught:
        files.write_atomically(path, "new")
    assert str(caught.value) == f"{path}: cannot write: {os.strerror(number)}; {remedy}"
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_file_systems_that_sync_no_folders(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    fails = pytest.raises(OSError, match="Input/output error")
    with fails if number == errno.EIO else contextlib.nullcontext():
        files.sync_folder(tmp_path)


def test_room_is_that_of_the_nearest_folder_there_is(tmp_path, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)._replace(free=4_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    files.check_room(tmp_path / "not" / "there", 4_000)
    with pytest.raises(OSError, match=r"No space left on device \(4,001 bytes needed, 4,000 free\)"):
        files.check_room(tmp_path, 4_001)
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize("through_a_link", [False, True])
def test_only_regular_files_are_opened(tmp_path, through_a_link):
    """Opening a pipe for reading would wait for a writer; a device such as /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    for special, words in ((tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a character device")):
        path = special
        if through_a_link:
            path = tmp_path / f"link to {words}"
            path.symlink_to(special)
        with pytest.raises(OSError, match=f"it is {words}, expected a regular file") as caught:
            files.open_regular(path)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(IsADirectoryError):
        files.open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "missing")


def test_small_files_are_read_up_to_a_bound(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    assert files.read_bytes(file, 10) == b"0123456789"
    with pytest.raises(OSError, match="it has 10 bytes, expected at most 9") as caught:
        files.read_bytes(file, 9)
    assert caught.value.errno == errno.EFBIG
    os.truncate(file, 1 << 40)  # sparse: read whole, it would fill the memory
    with pytest.raises(OSError, match="1,099,511,627,776 bytes"):
        files.read_bytes(file, 1 << 20)
    with pytest.raises(OSError, match="expected at most 3"):  # says that its size is 0
        files.read_bytes("/proc/self/status", 3)
