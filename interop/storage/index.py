"""Which files of a checkpoint folder hold its tensors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jaxmoe.errors import UserError, listed, quote, shortened
from jaxmoe.files import read_bytes
from jaxmoe.interop.storage.format import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    OTHER_WEIGHTS,
    SINGLE_FILE,
    Shard,
    is_inside,
    loads_strict,
)

_MAX_LISTED = 8
_MAX_VALUES = 2 * MAX_TENSORS + 1000  # a colon and a comma for each tensor, and some metadata


def find_files(folder: Path, problems: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The parsed index, if any, and the names of the shards that exist; what is wrong is appended to `problems`.

    Raises:
        UserError: there is no checkpoint in the folder, or its index is damaged.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such folder, expected a folder with {INDEX_FILE} or {SINGLE_FILE}")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is a file, expected a folder; give the folder that holds it, {folder.parent}"
        )
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
    if INDEX_FILE in present:
        return _read_index(folder, problems)
    found = [name for name in present if name.endswith(".safetensors")]
    if SINGLE_FILE in found or len(found) == 1:
        return None, [SINGLE_FILE if SINGLE_FILE in found else found[0]]
    if found:
        raise UserError(
            f"{folder}: {len(found)} safetensors files ({listed(found, _MAX_LISTED)}) but no {INDEX_FILE}, "
            "which says what they hold; download the index too"
        )
    others = [name for name in present if Path(name).suffix in OTHER_WEIGHTS]
    hint = (
        f"; found {listed(others, _MAX_LISTED)}: convert to safetensors first (save_pretrained of transformers does)"
        if others
        else f"; expected {INDEX_FILE} or {SINGLE_FILE}"
    )
    raise UserError(f"{folder}: no safetensors files{hint}")


def index_mismatches(weight_map: Mapping[str, Any], shards: Sequence[Shard]) -> Iterator[str]:
    """What an index says of tensors that the headers of its files do not."""
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for info in shard.tensors:
            holders.setdefault(info.name, []).append(shard.file)
    place_of = {name: _place(file) for name, file in weight_map.items()}
    for name, files in holders.items():
        if len(files) > 1:
            yield f"tensor {quote(name)} is stored more than once, in {listed(files, _MAX_LISTED)}; expected one file"
        elif name not in place_of:
            yield f"{files[0]}: holds tensor {quote(name)}, which {INDEX_FILE} does not name"
        elif place_of[name] != files[0]:
            yield f"{files[0]}: holds tensor {quote(name)}, which {INDEX_FILE} places in {quote(place_of[name])}"
    readable = {shard.file for shard in shards}
    for name, place in place_of.items():
        if name not in holders and place in readable:
            yield f"{place}: lacks tensor {quote(name)}, which {INDEX_FILE} places there"


def _read_index(folder: Path, problems: list[str]) -> tuple[dict[str, Any], list[str]]:
    where = folder / INDEX_FILE
    try:
        index = loads_strict(read_bytes(where, MAX_HEADER_BYTES), _MAX_VALUES)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{where}: damaged: {error}; download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: no weight_map, expected an object that names the file of every tensor")
    files, missing = [], []
    for file in sorted(set(map(_place, weight_map.values()))):
        if not is_inside(file) or not file.endswith(".safetensors"):
            problems.append(
                f"{INDEX_FILE}: names {quote(file)}, expected a safetensors file in this folder or below it"
            )
        elif _is_missing(folder / file):
            missing.append(shortened(file, 100))
        else:
            files.append(file)
    if missing:
        problems.append(
            f"{len(missing)} of the {len(missing) + len(files)} shards that {INDEX_FILE} names are missing: "
            f"{listed(missing, _MAX_LISTED)}; download them"
        )
    if SINGLE_FILE not in files and (folder / SINGLE_FILE).exists():
        problems.append(
            f"{SINGLE_FILE} lies beside {INDEX_FILE}, which does not name it: two checkpoints in one folder; "
            "remove one of them"
        )
    return index, files


def _place(value: object) -> str:
    """What an index calls a file, spelt in one way: ``./x`` is ``x``. No path is made of what is none."""
    if not isinstance(value, str):
        return repr(value)
    return PurePosixPath(value).as_posix() if is_inside(value) else value


def _is_missing(file: Path) -> bool:
    """Whether nothing is there. Why else it cannot be opened is found when it is."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
