"""Which files are text to learn from."""

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.files import why_unusable
from jaxmoe.folders import files_in, no_regular_file

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
        return root, files_in(root, include, exclude, SUFFIXES, _remedy)
    if not root.exists():
        raise UserError(f"{path}: no such file or folder; set the data path to a file or folder of text")
    if not root.is_file():
        raise no_regular_file(root)
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


def _remedy(passed_over: Mapping[str, int]) -> str:
    if passed_over.get(".json"):
        return "convert .json to .jsonl with one object per line"
    return "use include patterns to read other files as plain text"
