"""A folder of a base model with an adapter merged into it."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.interop.export_plan import (
    exported_shards,
    refuse_overlap,
    rewritten_files,
    side_files,
    source_files,
)
from jaxmoe.interop.peft.adapter import Adapter
from jaxmoe.interop.peft.combining import extract, told, weighted
from jaxmoe.interop.peft.merging import Merge
from jaxmoe.interop.peft.reading import read_adapter
from jaxmoe.interop.peft.today import Today, today
from jaxmoe.interop.peft.writing import write_adapter
from jaxmoe.interop.quantizing import Recorded, Replay
from jaxmoe.interop.source import Mtp, Source, open_source
from jaxmoe.interop.storage.writer import FolderWriter

_log = logging.getLogger(__name__)


def merge_folder(
    base: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    weight: float = 1.0,
    others: Sequence[tuple[str | Path, float]] = (),
    overwrite: bool = False,
    quantization: bool = False,
    mtp: Mtp = "declared",
) -> tuple[int, list[str]]:
    """Write a base model with an adapter merged in: the same files and tensors, in the same dtypes.

    Weights of a quantised base are written in bfloat16. Tensors that the adapter does not change keep their bytes, and
    every file beside them is copied. Memory is that of the adapter and of some pieces of a tensor.

    Args:
        base: folder or hub id of the model that the adapter was trained on.
        adapter: folder that PEFT or `write_adapter` wrote.
        folder: a new folder, or with `overwrite` an existing checkpoint that is replaced as a whole.
        weight: factor of what the adapter adds.
        others: further adapters of the same base, and the weight of each.
        overwrite: replace it.
        quantization: merge into the base as training saw it, which held it in few bits: its record is in the adapter's
            folder (`jaxmoe.interop.quantizing.Recorded`). What was quantised and is not adapted changes as well.
        mtp: see `Source`.

    Returns:
        How many tensors of the base changed, and its files that were left out (`jaxmoe.interop.export_plan.LEFT_OUT`).

    Raises:
        UserError: one of the two cannot be read, they do not fit each other, or the folder cannot be written.
    """
    source = dataclasses.replace(open_source(base), mtp=mtp)
    chosen = [(adapter, weight), *others]
    for one, _ in chosen:
        if Path(one).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{folder}: holds {one}, which replacing it would delete; choose another folder")
    model = today(source)
    whole = weighted([(read_adapter(one, model.anatomy), factor) for one, factor in chosen])
    replay = Replay(source, model, Recorded.read(Path(adapter))) if quantization else None
    for one, _ in chosen if replay is None else ():
        recorded = Recorded.find(Path(one))
        if recorded is not None and recorded.init == "loftq":
            raise UserError(
                f"{one}: its factors hold what quantising its base to {recorded.told} lost: expected --quantization, "
                "which quantises the base again before it is merged"
            )
        if recorded is not None:
            _log.warning("%s was trained on a base in %s, and is merged into it as it is", one, recorded.told)
    return write_merged(source, model, whole, folder, overwrite=overwrite, replay=replay)


def write_merged(
    source: Source,
    model: Today,
    adapter: Adapter,
    folder: str | Path,
    *,
    overwrite: bool = False,
    replaced_files: Mapping[str, Path | None] | None = None,
    replay: Replay | None = None,
) -> tuple[int, list[str]]:
    """`merge_folder` of an open base and an adapter at hand.

    Args:
        source: the base.
        model: the same in transformers.
        adapter: of it.
        folder, overwrite: as in `merge_folder`.
        replaced_files: files that take the place of the base's of those names; None leaves a file out.
        replay: see `Merge`.
    """
    origin, _ = source.opened
    refuse_overlap(origin, Path(folder))
    merge = Merge(adapter, source, model.bindings, replay)
    shards = exported_shards(source, "none")
    rewritten = rewritten_files(source, shards, "none")
    replaced = replaced_files or {}
    known = source_files(source, "none") | rewritten.keys() | replaced.keys()
    copied, left_out = side_files(origin, known)
    with FolderWriter(folder, overwrite=overwrite) as writer:
        writer.check_room(sum(shard.file_bytes for shard in shards))
        for shard in shards:
            writer.shard(shard, merge.fetch)
        for name, data in rewritten.items():
            writer.file(name, data)
        for name in copied:
            writer.copy(origin / name, name)
        for name, path in replaced.items():
            if path is not None:
                writer.copy(path, name)
    return len(merge.touched), left_out


def extract_folder(
    base: str | Path, tuned: str | Path, folder: str | Path, rank: int, *, overwrite: bool = False
) -> Mapping[str, float]:
    """Write the adapter that is nearest to what a fine-tune changed; see `jaxmoe.interop.peft.combining.extract`.

    Args:
        base: folder or hub id of the model before.
        tuned: after.
        folder: a new folder, or with `overwrite` one with an adapter that is replaced.
        rank: of every pair, per expert.
        overwrite: see `folder`.

    Returns:
        The relative error of each adapted parameter, which ``errors.txt`` in the folder has as well.

    Raises:
        UserError: one of the two cannot be read, they are different models or the same, or the folder cannot be
            written.
    """
    source, other = open_source(base), open_source(tuned)
    for one in (source, other):
        refuse_overlap(one.opened[0], Path(folder))
    model = today(source)
    found = extract(source, other, model, rank)
    lines = "\n".join(told(found.errors)) + "\n"
    write_adapter(
        found.adapter, model.anatomy, folder, overwrite=overwrite, extra_files={"errors.txt": lines.encode()}
    )
    return found.errors
