"""What a user calls a dataset to the files that hold its rows."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.files import why_unusable
from jaxmoe.folders import files_in, no_regular_file
from jaxmoe.hub import is_hub_id, snapshot

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".json", ".json.gz", ".json.zst"),
    *(".parquet", ".arrow"),
)

_NO_ROWS = (
    # What the datasets library keeps beside the rows that it saved, and results of its map.
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("*/dataset_info.json", "*/dataset_infos.json", "*/dataset_dict.json", "*/state.json"),
    *("cache-*.arrow", "*/cache-*.arrow"),
)
_EXPECTED = "a file or folder of rows, a glob pattern, or a dataset on the hub like org/name"


def find_row_files(
    path: str, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[Path, list[tuple[str, Path]]]:
    """The files with rows at ``path``, in the order of their names.

    An existing path wins over a pattern, and both over the hub, of which data files alone are downloaded. In a folder
    and without ``include``, the .json files that the datasets library writes beside its rows and its cache-*.arrow
    files are passed over, and what is hidden, and symlinks that lead out of the folder.

    Returns:
        The root, and (posix path relative to the root, path) of each file, sorted by the former.

    Raises:
        UserError: nothing is there, nothing is of a kind that can be read, or patterns come with a file.
    """
    unusable = why_unusable(path)
    if unusable is not None:
        raise UserError(f"{unusable}; set the data path to {_EXPECTED}")
    root = Path(path).expanduser()
    if not root.exists():
        if glob.has_magic(path):
            return _matching(root, include, exclude)
        if not is_hub_id(path):
            raise UserError(f"{path}: no such file or folder; set the data path to {_EXPECTED}")
        root = snapshot(path, [f"*{suffix}" for suffix in SUFFIXES], "dataset")
    if root.is_dir():
        left_out = (*exclude,) if not isinstance(exclude, str) else (exclude,)
        if include is None:
            left_out += _NO_ROWS
        found = files_in(root, include, left_out, SUFFIXES, _remedy)
        for _, file in found:
            _check_suffix(file)
        return root, found
    if not root.is_file():
        raise no_regular_file(root)
    _refuse_patterns(path, "a file", include, exclude)
    _check_suffix(root)
    return root.parent, [(root.name, root)]


def _matching(
    pattern: Path, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[Path, list[tuple[str, Path]]]:
    """The files that a glob pattern matches ("**" stands for any folders)."""
    _refuse_patterns(str(pattern), "a pattern", include, exclude)
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:fixed])
    matched = sorted(root.glob(str(Path(*pattern.parts[fixed:]))))
    files = [(file.relative_to(root).as_posix(), file) for file in matched if file.is_file()]
    usable = [
        (name, file) for name, file in files if name.lower().endswith(SUFFIXES) and not _is_hidden(name)
    ]
    if not usable:
        raise UserError(
            f"{pattern}: matches no usable file ({len(files)} of other kinds); looked for {', '.join(SUFFIXES)}; "
            "change the pattern"
        )
    return root, usable


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _refuse_patterns(path: str, what: str, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    if include is not None or exclude:
        raise UserError(
            f"{path}: include and exclude choose among the files of a folder, and this is {what}; leave them out or "
            "give the folder"
        )


def _check_suffix(file: Path) -> None:
    if not file.name.lower().endswith(SUFFIXES):
        raise UserError(
            f"{file}: unknown suffix {file.suffix!r}; expected one of {', '.join(SUFFIXES)}; convert or exclude it"
        )


def _remedy(passed_over: Mapping[str, int]) -> str:  # noqa: ARG001 - the same for every kind
    return "convert the rows to one of these"
