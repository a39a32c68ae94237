"""What touches a disk: paths as users give them, the lock of a folder, writes that a crash leaves whole, free room."""

import errno
import fcntl
import os
import shutil
import socket
import stat
import warnings
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from jaxmoe.errors import UserError, shortened

_PARTIAL = ".partial"
"""Ends the names of files and folders that are not whole yet."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def why_unusable(path: str | Path, *, allow: tuple[type[OSError], ...] = ()) -> str | None:
    """A sentence on why nothing could be at a path; None where something is, or could be.

    A name that is too long, a NUL in it, a loop of symlinks, a folder that may not be entered, the home of an
    unknown user: asked later, one function or another of pathlib would raise, and not the same in each Python.

    Args:
        path: may be missing.
        allow: errors of the system that are no reason.
    """
    try:
        Path(path).expanduser().stat()
        return None
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError, *allow)):
            return None
        reason = error.strerror or str(error)
    except ValueError:
        reason = "it has a character that no path can have"
    except RuntimeError as error:
        reason = str(error).rstrip(".")
    return f"found {shortened(str(path))!r}, which is no usable path ({reason})"


def path_argument(text: str) -> str:
    """The ``type=`` of a command's argument that is a path, or may be one.

    Raises:
        UserError: nothing could be there.
    """
    unusable = why_unusable(text)
    if unusable is not None:
        raise UserError(f"{unusable}; give another one")
    return text


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file to read it, and nothing else: a pipe would wait for ever, a device may never end.

    Raises:
        OSError: it cannot be opened; EINVAL where it is there and no regular file, ``strerror`` says what it is.
    """
    # Asked before as well, because opening a device may do something; O_NONBLOCK in case it was replaced since.
    _refuse_special(path, Path(path).stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_special(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file that is meant to be small.

    Args:
        path: the file.
        most: the largest number of bytes that is plausible for what it holds.

    Raises:
        OSError: it cannot be read or is no regular file; EFBIG where it is larger, with both figures in
            ``strerror``.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)  # what /proc holds has no size
        if max(size, len(content)) > most:
            raise OSError(
                errno.EFBIG,
                f"it has {max(size, len(content)):,} bytes, expected at most {most:,}",
                os.fspath(path),
            )
        return content


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """`read_bytes` as text.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def lock(path: Path, owner: str, *, wait: bool = False) -> int:
    """Lock a file, which is made if need be; the kernel lets go when the process ends, however it ends.

    Args:
        path: the file; it will say which process has it.
        owner: what the lock stands for, which begins the message.
        wait: until the process that holds it lets go, instead of raising.

    Returns:
        The descriptor that holds the lock until it is closed.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                os.close(descriptor)
                raise UserError(
                    f"{owner}: in use by {holder}: wait for it to end or choose another folder"
                ) from None
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); see to it that no other process writes "
                "there",
                stacklevel=2,
            )
        # Its former holder may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def partial(path: Path) -> Path:
    """What a file or folder is called until it is whole."""
    return path.with_name(path.name + _PARTIAL)


def write_atomically(path: Path, text: str) -> None:
    """Write a file. After a crash at any moment it has its old content or all of the new one.

    Raises:
        UserError: it cannot be written; it has its old content.
    """
    unfinished = partial(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise cannot_write(f"{path}: cannot write", error) from None


def sync(file: IO[Any]) -> None:
    """Return once what was written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Return once the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def check_room(path: Path, nbytes: int) -> None:
    """Refuse a disk without room for so many bytes at a path, which may be missing. It may still fill up later.

    Raises:
        OSError: ENOSPC, with both figures in its words.
    """
    existing = next(place for place in (path, *path.parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({nbytes:,} bytes needed, {free:,} free)")


def cannot_write(what: str, error: OSError, state: str = "") -> UserError:
    """The mistake that a failed write is: what failed, the system's reason, what is left, and the remedy."""
    remedy = "free some space or choose" if error.errno in _NO_ROOM else "choose"
    left = f"{state}, " if state else ""
    return UserError(f"{what}: {error.strerror}; {left}{remedy} another folder")
