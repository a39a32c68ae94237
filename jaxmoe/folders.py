"""Which files of a folder are data."""

import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxmoe.errors import UserError


def files_in(
    root: Path,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    suffixes: tuple[str, ...],
    remedy: Callable[[Mapping[str, int]], str],
) -> list[tuple[str, Path]]:
    """The files of a folder and its subfolders, in the order of their names.

    Hidden files and folders are passed over, and so are symlinks that lead out of the folder. In a snapshot of the
    hub's cache, which holds links alone, they may lead to where the cache keeps the repository's files.

    Args:
        root: the folder.
        include: glob patterns on the posix path relative to it ("*" also matches "/"); None for the suffixes.
        exclude: the like, of what is left out.
        suffixes: how names end, in small letters.
        remedy: what to do where there is none, of how many files there were of each suffix.

    Returns:
        (posix path relative to the root, path) of each file, sorted by the former.

    Raises:
        UserError: there is none, or one of them is a pipe, a device or a socket.
    """
    include, exclude = _patterns(include), _patterns(exclude) or ()
    within = (root.parent.parent if root.parent.name == "snapshots" else root).resolve()
    found, passed_over, leading_out = [], Counter[str](), 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            relative = file.relative_to(root).as_posix()
            if name.startswith(".") or _matches(relative, exclude):
                continue
            wanted = _matches(relative, include) if include else name.lower().endswith(suffixes)
            if not wanted:
                passed_over[file.suffix.lower() or "no suffix"] += 1
            elif file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(within):
                leading_out += 1
            elif file.is_file():
                found.append((relative, file))
            elif file.exists():
                raise no_regular_file(file)
    if not found:
        looked_for = ", ".join(include or suffixes)
        there = ", ".join(f"{suffix} ({count})" for suffix, count in passed_over.most_common(4)) or "nothing"
        links = f"; {leading_out} symlinks lead out of the folder and are not followed" if leading_out else ""
        raise UserError(
            f"{root}: no usable file; looked for {looked_for}, found {there}{links}; {remedy(passed_over)}"
        )
    return sorted(found)


def no_regular_file(file: Path) -> UserError:
    """What to say of a pipe, a device or a socket."""
    return UserError(
        f"{file}: no regular file but a pipe, a device or a socket, which cannot be read twice; write its text to a "
        "file"
    )


def _patterns(patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns)
