"""What an export that follows a folder consists of: files of tensors, files written anew, copies, and what is left out.

The names of files are the source's, but for those under which transformers would not find the weights.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.interop.quantization.config import FIELD
from jaxmoe.interop.quantization.config import FILES as QUANTIZATION_FILES
from jaxmoe.interop.quantization.folder import Files, QuantizedFolder
from jaxmoe.interop.source import Source
from jaxmoe.interop.storage.format import INDEX_FILE, OTHER_WEIGHTS, SINGLE_FILE, Shard
from jaxmoe.interop.storage.reader import CheckpointFolder
from jaxmoe.interop.storage.writer import index_json

_log = logging.getLogger(__name__)

QUANTIZATIONS = ("none", "source")
"""What becomes of tensors that the source has quantised: bfloat16, or the source's format."""

LEFT_OUT = "other weights, the state of another training, or no regular files"
"""What `side_files` leaves out."""

_WEIGHTS = OTHER_WEIGHTS | {".safetensors"}
"""Copies of the weights before training would contradict the ones exported."""

# What transformers' Trainer, accelerate, DeepSpeed and PEFT keep: it belongs to the weights before training. Their
# optimizer.pt, rng_state.pth and so on have suffixes of weights.
_TRAINING_FILES = (
    "trainer_state.json",
    "events.out.tfevents.*",
    "latest",
    "zero_to_fp32.py",
    "adapter_config.json",
)
_TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb")
_OF_TOOLS = (".cache", ".git")
"""What git and the hub's client keep; in a submodule ``.git`` is a file."""


def refuse_overlap(origin: Path, folder: Path) -> None:
    """Refuse to write where the source lies.

    Args:
        origin: folder of the source.
        folder: that is to be written.

    Raises:
        UserError: the export would read what it writes.
    """
    there, here = origin.resolve(), folder.resolve()
    if there == here:
        raise UserError(f"{folder}: is the folder that the model was loaded from; export to another one")
    if here.is_relative_to(there):
        raise UserError(
            f"{folder}: lies inside {origin}, all of which is exported; choose a folder outside of it"
        )
    if there.is_relative_to(here):
        raise UserError(
            f"{folder}: holds {origin}, which the model was loaded from and which replacing it would delete; "
            "choose another folder"
        )


def exported_shards(source: Source, quantization: str) -> Sequence[Shard]:
    """The files of tensors that an export which follows `source` writes.

    They are called as in the source where transformers finds them: one file has to be ``model.safetensors``, which
    must not be one of several.

    Raises:
        UserError: an unknown `quantization`.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization {quantization!r}: expected {' or '.join(map(repr, QUANTIZATIONS))}")
    _, files = source.opened
    stored = _stored(files)
    shards = stored.shards if quantization == "source" else files.shards
    if stored.index is None:
        return [shard if shard.file == SINGLE_FILE else shard.renamed(SINGLE_FILE) for shard in shards]
    if len(shards) > 1 and any(shard.file == SINGLE_FILE for shard in shards):
        count = len(shards)
        return [
            shard.renamed(f"model-{number:05d}-of-{count:05d}.safetensors")
            for number, shard in enumerate(shards, 1)
        ]
    return list(shards)


def exported_config(source: Source) -> Mapping[str, Any]:
    """config.json of an export: that of the source, but for layers that it counts and does not have.

    Where these stay, since `Source.mtp` says so, a line in the log tells of them.
    """
    lacking = source.lacking
    if not lacking:
        return source.raw
    if source.mtp == "present":
        return source.family.with_fields(source.raw, dict.fromkeys(lacking, 0))
    counted = " and ".join(f"{name} = {count}" for name, count in lacking.items())
    _log.warning(
        "config.json says %s, and the model came without tensors of such layers, so the export has none; converters to "
        "GGUF fail on that: set train.export_mtp or --mtp to 'present', which writes 0",
        counted,
    )
    return source.raw


def rewritten_files(source: Source, shards: Sequence[Shard], quantization: str) -> dict[str, bytes]:
    """Files of the source, by name, that an export with the given `shards` has with another content.

    The index where it would not be true, or lacks the metadata that transformers asks for; and config.json where
    something quantised is written in bfloat16, or as `exported_config` has it.
    """
    _, files = source.opened
    stored = _stored(files)
    rewritten = {}
    config = exported_config(source)
    if isinstance(files, QuantizedFolder) and quantization == "none":
        config = {name: value for name, value in config.items() if name != FIELD}
        spellings = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        config |= dict.fromkeys(spellings, files.dtype)
    if config is not source.raw:
        rewritten["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    if stored.index is not None and (
        tuple(shards) != stored.shards or not isinstance(stored.index.get("metadata"), dict)
    ):
        rewritten[INDEX_FILE] = index_json(shards)
    return rewritten


def source_files(source: Source, quantization: str) -> set[str]:
    """Files whose place the export's own take: those of tensors, and what describes a format that it has not."""
    _, files = source.opened
    described = (
        QUANTIZATION_FILES
        if isinstance(files, QuantizedFolder) and quantization == "none"
        else frozenset[str]()
    )
    return {shard.file for shard in _stored(files).shards} | described


def _stored(files: Files) -> CheckpointFolder:
    return files.stored if isinstance(files, QuantizedFolder) else files


def side_files(folder: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """The other files of a source, by their paths in it: those to copy, and those to leave out (see `LEFT_OUT`).

    A folder that is left out as a whole ends in a slash. Of what git and the hub's client keep nothing is said.

    Args:
        folder: of the source.
        known: files in it that are accounted for.

    Raises:
        UserError: a folder cannot be listed.
    """
    copied: list[str] = []
    left_out: list[str] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        inside = Path(place).relative_to(folder)
        if inside == Path():
            folders[:] = [name for name in folders if name not in _OF_TOOLS]
            names = [name for name in names if name not in _OF_TOOLS]
        for name in list(folders):
            if (Path(place) / name).is_symlink() or (inside == Path() and _matches(name, _TRAINING_FOLDERS)):
                folders.remove(name)
                left_out.append(f"{(inside / name).as_posix()}/")
        for name in names:
            path = (inside / name).as_posix()
            if path in known:
                continue
            regular = os.path.isfile(Path(place) / name)  # noqa: PTH113 -- false, whatever keeps it from being looked at
            other = Path(name).suffix.lower() in _WEIGHTS or _matches(name, _TRAINING_FILES)
            (copied if regular and not other else left_out).append(path)
    return sorted(copied), sorted(left_out)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
