"""Which files of a folder are data."""

import fnmatch
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.files import why_unusable

STANDARD_LIBRARY = "python:stdlib"
"""The path that stands for the running Python's standard library: text that every machine has."""

STANDARD_LIBRARY_INCLUDE = ("*.py",)
STANDARD_LIBRARY_EXCLUDE = (
    # Tests hold files that are deliberately not UTF-8; encodings are tables; the last two differ per build.
    *("test/*", "*/test/*", "*/tests/*", "idlelib/*", "lib2to3/*", "turtledemo/*", "encodings/*"),
    *("site-packages/*", "dist-packages/*", "config-*/*", "_sysconfigdata*"),
)

SUFFIXES = (".jsonl", ".parquet", ".txt")


def find_files(
    path: str, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[Path, list[tuple[str, Path]]]:
    """The data files at ``path``, in the order of their names.

    Hidden files and folders are passed over, and so are symlinks that lead out of the folder.

    Returns:
        The root, and (posix path relative to the root, path) of each file, sorted by the former.

    Raises:
        UserError: nothing is there, nothing is of a kind that can be read, or patterns come with a file.
    """
    unusable = why_unusable(path)
    if unusable is not None:
        raise UserError(f"{unusable}; set the data path to a file or folder of text")
    if path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        if include is None and not exclude:
            include, exclude = STANDARD_LIBRARY_INCLUDE, STANDARD_LIBRARY_EXCLUDE
    else:
        root = Path(path).expanduser()
    if root.is_dir():
        return root, _in_folder(root, include, exclude)
    if not root.exists():
        raise UserError(f"{path}: no such file or folder; set the data path to a file or folder of text")
    if not root.is_file():
        raise UserError(_special(root))
    if include is not None or exclude:
        raise UserError(f"{path}: include and exclude choose among the files of a folder, and this is a file")
    if root.suffix.lower() == ".json":
        raise UserError(
            f"{path}: a .json file, whose rows cannot be read one by one; convert it to .jsonl with one object per "
            "line, for example with jq -c '.[]'"
        )
    if root.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path}: unknown suffix {root.suffix!r}; expected one of {', '.join(SUFFIXES)}, "
            "or the folder with an include pattern to read other files as plain text"
        )
    return root.parent, [(root.name, root)]


def _in_folder(root: Path, include: Sequence[str] | None, exclude: Sequence[str]) -> list[tuple[str, Path]]:
    include, exclude = _patterns(include), _patterns(exclude) or ()
    real_root = root.resolve()
    found, passed_over, leading_out = [], Counter[str](), 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            relative = file.relative_to(root).as_posix()
            if name.startswith(".") or _matches(relative, exclude):
                continue
            wanted = _matches(relative, include) if include else file.suffix.lower() in SUFFIXES
            if not wanted:
                passed_over[file.suffix.lower() or "no suffix"] += 1
            elif file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(real_root):
                leading_out += 1
            elif file.is_file():
                found.append((relative, file))
            elif file.exists():
                raise UserError(_special(file))
    if not found:
        looked_for = ", ".join(include or SUFFIXES)
        there = ", ".join(f"{suffix} ({count})" for suffix, count in passed_over.most_common(4)) or "nothing"
        links = f"; {leading_out} symlinks lead out of the folder and are not followed" if leading_out else ""
        remedy = (
            "convert .json to .jsonl with one object per line"
            if passed_over[".json"]
            else "use include patterns to read other files as plain text"
        )
        raise UserError(f"{root}: no usable file; looked for {looked_for}, found {there}{links}; {remedy}")
    return sorted(found)


def _special(file: Path) -> str:
    return (
        f"{file}: no regular file but a pipe, a device or a socket, which cannot be read twice; write its text to a "
        "file"
    )


def _patterns(patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns)
