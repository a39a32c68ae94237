"""Checkpoints of a run: written in the background, atomic, and restored to any sharding.

A checkpoint is a folder named after its step. It gets that name by a rename once everything in it is on disk,
so a process that is killed, or a disk that fills up, leaves the earlier checkpoints as they were and a folder
with a temporary name, which the next start removes.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmoe import signals
from jaxmoe.errors import UserError, shortened
from jaxmoe.files import check_room, write_atomically
from jaxmoe.parallel import processes

_WRITING = ".orbax-checkpoint-tmp"
_DELETING = ".deleting"
_INVENTORY = "_FILES.json"
_log = logging.getLogger(__name__)
_QUIET_SECONDS = 0.2
_STRAGGLERS_SECONDS = 5.0
_CHUNK_BYTES = 4 << 20
_READERS = 8
_TENSORSTORE_OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")


# Not orbax's CheckpointManager, which keeps the newest as well: it deletes an old checkpoint in place, so that one
# whose deletion was killed still counts, and it leaves a failed save on the full disk until the next start.
class Checkpoints:
    """The checkpoints in one folder. With several processes, each of them calls every method.

    Args:
        folder: where they are; created at the first save.
        keep: how many of the newest to keep. An older one is deleted once the next save begins or `wait`
            returns, so that there is one more while a save is under way. None opens the folder for reading:
            nothing is cleaned up, which is safe while another process trains.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, found {keep}")
        _silence_writers()
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._saved = set(self.steps())
        self._saving: int | None = None
        self._checkpointer = _checkpointer()
        if keep is not None:
            processes.first(self._remove_leftovers)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint, after the previous one has been finished.

        Arrays are on the host, or held, when this returns: a training step may take their buffers. A step
        that has a checkpoint already is not written again.

        Args:
            step: the optimiser steps that `state` has behind it.
            state: a tree of `jax.Array`.
            extra: what JSON can hold.

        Raises:
            UserError: this save or the one before failed for want of space or rights.
        """
        if self._keep is None:
            raise ValueError("these checkpoints were opened for reading: give a number to keep")
        self.wait()
        if step in self._saved:
            return
        needed = sum(processes.gather(_bytes_here(state)))
        self._saving = step
        self._together(lambda: self._make_room(needed))
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), extra=ocp.args.JsonSave(extra))
        # Interrupted in the middle, orbax would leave a thread that waits for what nobody does any more.
        with signals.deferred():
            self._together(lambda: self._checkpointer.save(self._folder / str(step), args=arguments))

    def _make_room(self, needed: int) -> None:
        """Refuse before anything is written: a write that fails halfway makes TensorStore print tracebacks."""
        self._folder.mkdir(parents=True, exist_ok=True)
        check_room(self._folder, needed)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; one being written has none yet. Process 0 looks for all."""
        return processes.first(self._steps_here)

    def _steps_here(self) -> list[int]:
        return steps_in(self._folder)

    def latest(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Args:
            step: one of `steps`.
            abstract_state: the tree that was saved, of `jax.ShapeDtypeStruct` with the shardings wanted;
                they may differ from those that were saved. A leaf ``...`` is not read and stays ``...``.

        Returns:
            The state and the ``extra`` that were saved.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or of another tree or other shapes. It is never
                passed over in silence.
        """
        self.wait()
        steps = self.steps()
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self._folder}: no checkpoint of step {step}, there are: {known}")
        processes.agree(lambda: self._check_whole(step))
        processes.agree(lambda: self._check_shapes(step, abstract_state))
        return processes.agree(lambda: self._read(step, abstract_state))

    def _check_whole(self, step: int) -> None:
        folder = self._folder / str(step)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: process {jax.process_index()} has no such folder where process 0 has a checkpoint: "
                "put output_dir on a disk that all of them share"
            )
        wrong = _first_difference(folder)
        if wrong:
            raise self._damaged(step, wrong)

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        """Tell a sound checkpoint of another model from a damaged one."""
        folder = self._folder / str(step)
        try:
            saved = _leaves(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)
        except Exception as error:  # of many types
            raise self._damaged(step, str(error) or type(error).__name__) from error
        wanted = _leaves(abstract_state)
        for name in sorted(saved.keys() | wanted.keys()):
            there, here = saved.get(name, "nothing"), wanted.get(name, "nothing")
            if there != here and wanted.get(name) is not ...:
                raise UserError(
                    f"{folder}: this checkpoint is of another model than the run's: found {there} at {name}, "
                    f"expected {here}: put back what model.path or model.config was when the run began, or "
                    "choose another output_dir"
                )

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        sharded = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        try:
            restored = self._checkpointer.restore(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(abstract_state, restore_args=sharded),
                    extra=ocp.args.JsonRestore(),
                ),
            )
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # of many types, bare Exception among them
            # Its files are what was written, so it may be another version's, put together in another way.
            then = "go on with the version of jaxmoe that wrote it, or if that cannot read it either "
            raise self._damaged(step, str(error) or type(error).__name__, then) from error
        if restored.state is None or restored.extra is None:
            raise self._damaged(step, "state or extra is missing")
        return restored.state, restored.extra

    def wait(self) -> None:
        """Return once the save under way is on disk.

        Raises:
            UserError: it failed for want of space or rights.
        """
        self._together(self._checkpointer.wait_until_finished)
        if self._saving is not None:
            _write_inventory(self._folder / str(self._saving))
            self._saved.add(self._saving)
            self._saving = None
        if self._keep is not None:
            processes.first(self._delete_old)

    def close(self) -> None:
        """Finish the save under way and stop the threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def close_within(self, seconds: float) -> None:
        """`close`, given up after so many seconds: what is not whole by then is removed by the next start."""

        def close() -> None:
            with contextlib.suppress(Exception):  # what ended the run is what is told
                self.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            _log.warning("%s: gave up the checkpoint under way after %.0f s", self._folder, seconds)

    def _together(self, action: Callable[[], None]) -> None:
        """Do a part of a save in every process; where it fails in one, the save has failed in all."""

        def attempt() -> None:
            try:
                action()
            except Exception as error:
                self._fail(error)

        try:
            processes.agree(attempt)
        except BaseException:
            self._saving = None
            raise

    def _fail(self, error: Exception) -> None:
        """Raise what a failed save means to the user; raises `error` itself where it is a fault of ours.

        This process may be the only one that comes here.
        """
        # Threads of the failed save may still be writing, and would report their own errors to the next one.
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = _checkpointer()
        if jax.process_index() == 0:
            self._remove_what_failed()
        reason = _os_reason(error)
        if reason is None:
            raise error
        latest = max(self._steps_here(), default=None)
        still = (
            "there is no earlier one" if latest is None else f"the checkpoint of step {latest} is still valid"
        )
        raise UserError(
            f"{self._folder}: cannot write the checkpoint of step {self._saving}: {reason}; {still}: "
            "make room and start the same command again"
        ) from error

    def _damaged(self, step: int, reason: str, first: str = "") -> UserError:
        earlier = [other for other in self._steps_here() if other < step]
        then = f"to resume from step {earlier[-1]}" if earlier else "to start from the beginning"
        reason = shortened(" ".join(reason.split()))
        folder = self._folder / str(step)
        return UserError(
            f"{folder}: this checkpoint cannot be read ({reason}): {first}delete that folder {then}"
        )

    def _remove_leftovers(self) -> None:
        if self._folder.is_dir():
            self._delete([e for e in self._folder.iterdir() if e.name.endswith((_WRITING, _DELETING))])

    def _remove_what_failed(self) -> None:
        """Writes that were under way end a little later, in TensorStore's threads, and make their folder again."""
        give_up = time.monotonic() + _STRAGGLERS_SECONDS
        quiet = False
        while not quiet and time.monotonic() < give_up:
            self._remove_leftovers()
            time.sleep(_QUIET_SECONDS)
            quiet = not self._folder.is_dir() or not any(
                entry.name.endswith(_WRITING) for entry in self._folder.iterdir()
            )

    def _delete_old(self) -> None:
        assert self._keep is not None
        self._delete([self._folder / str(step) for step in self._steps_here()[: -self._keep]])

    def _delete(self, folders: list[Path]) -> None:
        """Delete checkpoints so that none is ever seen in part: by another name first."""
        for folder in folders:
            doomed = folder.with_name(folder.name.removesuffix(_DELETING) + _DELETING)
            try:
                folder.rename(doomed)
            except OSError as error:
                raise UserError(f"{folder}: cannot delete this checkpoint: {error.strerror}") from error
            # What stays behind, such as a file that a network file system holds, goes at the next start.
            shutil.rmtree(doomed, ignore_errors=True)


def _checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), extra=ocp.JsonCheckpointHandler())
    )


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint there, ascending, as this process sees it."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def _leaves(tree: Any) -> dict[str, Any]:
    """The shape of every leaf by its path; ``...`` stays. orbax gives tuples back as lists."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf if leaf is ... else list(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _bytes_here(state: Any) -> int:
    """What this process writes of a state: of the copies of a shard, the first."""
    shards = (shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _INVENTORY)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _checksums(folder: Path, names: Sequence[str]) -> list[int]:
    """CRC-32 of files, several at a time: neither reading nor zlib holds the interpreter's lock."""

    def of(name: str) -> int:
        value = 0
        with (folder / name).open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                value = zlib.crc32(chunk, value)
        return value

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(of, names))


def _write_inventory(folder: Path) -> None:
    """List the files of a finished checkpoint, [bytes, CRC-32] each, so that a damaged copy is recognised.

    A kill before this, or a full disk, leaves a checkpoint that is valid but has no list.
    """
    if jax.process_index() != 0:
        return
    with contextlib.suppress(OSError, UserError):
        sizes = _sizes(folder)
        sums = _checksums(folder, list(sizes))
        listed = {name: [size, crc] for (name, size), crc in zip(sizes.items(), sums, strict=True)}
        write_atomically(folder / _INVENTORY, json.dumps(listed, indent=1))


def _first_difference(folder: Path) -> str | None:
    """Compare a checkpoint with its inventory: orbax restores wrong numbers without a word, or tells over pages.

    Each process reads its share of the files. Inventories of earlier versions have sizes only.
    """
    try:
        listed = json.loads((folder / _INVENTORY).read_text(encoding="utf-8"))
        entries = {name: one if isinstance(one, list) else [one, None] for name, one in listed.items()}
        expected = {name: (int(size), crc) for name, (size, crc) in entries.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return f"{_INVENTORY} is no list of files"
    found = _sizes(folder)
    for name, (size, _) in sorted(expected.items()):
        if found.get(name) != size:
            return f"{name} is missing" if name not in found else f"{name} has {found[name]} of {size} bytes"
    mine = sorted(name for name, (_, crc) in expected.items() if crc is not None)
    mine = mine[jax.process_index() :: jax.process_count()]
    for name, crc in zip(mine, _checksums(folder, mine), strict=True):
        if crc != expected[name][1]:
            return f"{name} is not as it was written: its checksum is {crc:#010x}, expected {expected[name][1]:#010x}"
    return None


def _os_reason(error: BaseException) -> str | None:
    """Words of the operating system for a failed write, or None for a failure of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError or RuntimeError with the number in its text.
    found = _TENSORSTORE_OS_ERROR.search(str(error))
    return os.strerror(int(found[1] or found[2])) if found else None


class _FromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


class _OfFailedWrites(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return _TENSORSTORE_OS_ERROR.search(str(error)) is None


class _OfClosedLoops:
    """A hook for exceptions that nothing can catch: drops those of event loops that are closed."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


def _silence_writers() -> None:
    """Drop what libraries print, with tracebacks and in pieces, of a failure that they raise as well.

    Orbax logs it through absl. Of many writes the first that fails ends the event loop that waits for all: asyncio
    logs the errors of others, and TensorStore's threads print that the loop is closed when theirs end.
    """
    for name, kind in (("absl", _FromOrbax), ("asyncio", _OfFailedWrites)):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, kind) for existing in logger.filters):
            logger.addFilter(kind())
    if not isinstance(sys.unraisablehook, _OfClosedLoops):
        sys.unraisablehook = _OfClosedLoops(sys.unraisablehook)
