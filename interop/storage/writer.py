"""Writing safetensors files and checkpoint folders, such that a folder is either complete or not there."""

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from jaxmoe.errors import UserError
from jaxmoe.files import cannot_write, check_room, lock, open_regular, sync, sync_folder
from jaxmoe.interop.storage.format import (
    DTYPES,
    SINGLE_FILE,
    Shard,
    TensorInfo,
    element_bytes,
    is_inside,
    new_shard,
)

Fetched = np.ndarray | bytes | bytearray | memoryview | Iterator[bytes | bytearray | memoryview]
FORMAT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})  # what transformers insists on
COPY_BYTES = 4 << 20
_CHECKPOINT_FILES = ("config.json", "adapter_config.json", "*.safetensors")


def write_shard(path: str | os.PathLike[str], shard: Shard, fetch: Callable[[TensorInfo], Fetched]) -> None:
    """Write a new file: the shard's header as it stands, then one tensor at a time in offset order.

    ``fetch`` gives a tensor as an array of its dtype and shape, as bytes, or as an iterator of pieces.

    Raises ValueError (naming the tensor) where that is not the dtype, the shape or the number of bytes that
    the header says, TypeError for another type, FileExistsError if the file exists, OSError if it cannot be
    written. Whatever is raised, no part of a file is left.
    """
    path = Path(path)
    with path.open("xb", buffering=0) as file:
        try:
            _write_all(file, shard.prefix)
            for info in shard.tensors:
                written = 0
                for piece in _pieces(info, fetch(info)):
                    written += len(piece)
                    if written > info.nbytes:
                        break
                    _write_all(file, piece)
                if written != info.nbytes:
                    relation = "more" if written > info.nbytes else f"{written}, fewer"
                    raise ValueError(f"tensor {info.name!r}: fetched {relation} than its {info.nbytes} bytes")
            sync(file)
        except BaseException:
            path.unlink()
            raise


def _pieces(info: TensorInfo, data: Fetched) -> Iterator[memoryview]:
    if isinstance(data, np.ndarray):
        dtype = DTYPES[info.dtype].numpy
        if data.dtype != dtype or data.shape != info.shape:
            raise ValueError(
                f"tensor {info.name!r}: fetched {data.dtype} {data.shape}, expected {info.dtype} {info.shape}"
            )
        yield np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    elif isinstance(data, bytes | bytearray | memoryview):
        yield _as_bytes(data)
    elif isinstance(data, Iterator):
        yield from map(_as_bytes, data)
    else:
        raise TypeError(
            f"tensor {info.name!r}: fetched {type(data).__name__}, expected an array, bytes or an iterator"
        )


def _as_bytes(data: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses an axis of 0


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]


def plan_shards(tensors: Sequence[tuple[str, str, Sequence[int]]], max_shard_bytes: int) -> list[Shard]:
    """Split tensors, (name, safetensors dtype, shape) each, into files as transformers' save_pretrained does.

    They are taken in the given order; a file is closed when the next tensor would take it over
    ``max_shard_bytes`` (tensor bytes, headers not counted), and a larger tensor gets a file of its own. Each
    file is laid out as the safetensors library would. One file is named ``model.safetensors``, several
    ``model-00001-of-0000n.safetensors``.

    Raises ValueError for no tensors, a repeated name, an unknown dtype or a limit that is not positive.
    """
    if not tensors or max_shard_bytes < 1:
        raise ValueError(
            f"{len(tensors)} tensors in shards of {max_shard_bytes} bytes, expected some of each"
        )
    named = {tensor[0]: tensor for tensor in tensors}
    if len(named) != len(tensors):
        raise ValueError(f"{len(tensors) - len(named)} tensor names are repeated")
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: element_bytes(tensor[1], tensor[2]),
        filename_pattern=SINGLE_FILE.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    return [
        new_shard(file, [named[name] for name in names], FORMAT_METADATA)
        for file, names in split.filename_to_tensors.items()
    ]


def index_json(shards: Sequence[Shard]) -> bytes:
    """``model.safetensors.index.json`` as transformers 5 writes it: the totals and the weight map.

    Every stored element counts as a parameter, so persistent buffers do too.
    """
    tensors = [info for shard in shards for info in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(info.shape) for info in tensors),
            "total_size": sum(info.nbytes for info in tensors),
        },
        "weight_map": {info.name: info.file for info in tensors},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


class FolderWriter:
    """Exports a folder as a whole: ``with FolderWriter(target) as writer: writer.shard(...)``.

    Everything is written to a hidden folder next to ``target``, which takes its place when the block ends
    without an exception; otherwise it is removed and ``target`` is as it was. What a killed export to the
    same target has left (hidden, next to it) is cleared first. Threads may write different files at once.

    With ``overwrite`` an existing checkpoint folder is kept until the new one is complete, then deleted as a
    whole, with all that is in it.

    Raises UserError, from the constructor on, for a target that cannot be taken: a file, a folder that is not
    empty (without ``overwrite``) or that holds no checkpoint (with it), or one that another process is
    exporting to; and for a disk that is full or cannot be written.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.target = Path(target).resolve()  # through links: the folder is replaced, not the link to it
        self.overwrite = overwrite
        if not self.target.name:
            raise UserError(f"{self.target}: cannot be exported to, expected a new folder")
        with self._user_errors("the folder"):
            self._refuse_occupied()
        self._temporary = self._sibling(f"tmp-{secrets.token_hex(4)}")
        self._undo: ExitStack | None = None

    def __enter__(self) -> Self:
        with self._user_errors("the folder"), ExitStack() as undo:
            self._make_parents(undo)
            path = self._sibling("lock")  # any other temporary folder of the target is of a dead process
            undo.callback(os.close, lock(path, str(self.target)))
            undo.callback(path.unlink, missing_ok=True)
            self._clear_leftovers()
            self._refuse_occupied()
            undo.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            self._temporary.mkdir()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert self._undo is not None
        with self._undo:
            self._undo = None
            if kind is None:
                with self._user_errors("the folder"):
                    self._publish()

    def check_room(self, nbytes: int) -> None:
        """Refuse a disk that has no room for as many bytes. It may still fill up while they are written."""
        with self._user_errors("the folder"):
            check_room(self.target.parent, nbytes)

    def shard(self, shard: Shard, fetch: Callable[[TensorInfo], Fetched]) -> None:
        """Write one safetensors file; see ``write_shard``."""
        with self._user_errors(shard.file, shard.file_bytes):
            write_shard(self._place(shard.file), shard, fetch)

    def file(self, name: str, data: bytes) -> None:
        """Write a small file. ``name`` may be a path below the folder."""
        with self._user_errors(name, len(data)), self._place(name).open("xb", buffering=0) as file:
            _write_all(file, data)
            sync(file)

    def copy(self, source: str | os.PathLike[str], name: str) -> None:
        """Copy the content of a regular file (through links). ``name`` may be a path below the folder."""
        try:
            original = open_regular(source)  # apart: only opening is the source's fault
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror}") from error
        size = os.fstat(original.fileno()).st_size
        with original, self._user_errors(name, size), self._place(name).open("xb", buffering=0) as file:
            while chunk := original.read(COPY_BYTES):
                _write_all(file, chunk)
            sync(file)

    def _place(self, name: str) -> Path:
        if self._undo is None:
            raise RuntimeError("FolderWriter is used outside its with block")
        if not is_inside(name):
            raise UserError(
                f"file name {name!r} leaves the folder {self.target}, expected a relative path below it"
            )
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise ValueError(f"{name!r} is written twice")
        return path

    def _sibling(self, suffix: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{suffix}")

    def _refuse_occupied(self) -> None:
        target = self.target
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise UserError(f"{target}: is a file, expected a new or empty folder; choose another name")
        if not any(target.iterdir()):
            return
        if not self.overwrite:
            raise UserError(
                f"{target}: is not empty, expected a new or empty folder; choose another or set overwrite"
            )
        if not any(any(target.glob(pattern)) for pattern in _CHECKPOINT_FILES):
            raise UserError(
                f"{target}: holds no checkpoint, and overwriting would delete all that is in it; "
                "choose another folder"
            )

    def _make_parents(self, undo: ExitStack) -> None:
        for parent in reversed(self.target.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                undo.callback(_remove_if_empty, parent)

    def _clear_leftovers(self) -> None:
        pattern = re.compile(re.escape(f".{self.target.name}.") + "(tmp|old)-[0-9a-f]{8}")
        for sibling in list(self.target.parent.iterdir()):
            match = pattern.fullmatch(sibling.name)
            if match is None:
                continue
            if match[1] == "old" and not (self.target.exists() and any(self.target.iterdir())):
                sibling.rename(self.target)  # killed between the two renames of _publish
            else:
                shutil.rmtree(sibling)

    def _publish(self) -> None:
        for folder, _, _ in os.walk(self._temporary):
            sync_folder(folder)
        if self.target.exists() and any(self.target.iterdir()):
            self._refuse_occupied()  # it may have been filled meanwhile
            old = self._sibling(f"old-{secrets.token_hex(4)}")
            self.target.rename(old)
            try:
                self._temporary.rename(self.target)
            except BaseException:
                old.rename(self.target)
                raise
            sync_folder(self.target.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self._temporary.rename(self.target)
            sync_folder(self.target.parent)

    @contextmanager
    def _user_errors(self, what: str, nbytes: int | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size = "" if nbytes is None else f" ({nbytes:,} bytes)"
            raise cannot_write(
                f"{self.target}: cannot write {what}{size}", error, "nothing was left behind"
            ) from error


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
