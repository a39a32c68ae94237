"""Runs that are killed, interrupted, starved of disk, or damaged: what is left is valid, and ends in equal results."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile import sandbox, workspace

COMMAND = ["train", "run.yaml"]
_ENDS_WITHIN = 90.0
"""Seconds from a signal to the end: a run finishes the checkpoint under way."""

Verdict = tuple[str, str | None]
"""What was done, and what was wrong with its result."""


def reference(folder: Path) -> tuple[dict[str, object], float]:
    """The run undisturbed: its results, and how long it took."""
    done = sandbox.run(COMMAND, folder, seconds=600)
    if done.code:
        raise RuntimeError(f"the undisturbed run ended with {done.code}: {done.err}")
    left = workspace.result(folder / "out")
    shutil.rmtree(folder / "out")
    return left, done.seconds


def killed(folder: Path, count: int, seed: int) -> Iterator[Verdict]:
    """kill -9 at random moments; each run is started again until it is done."""
    yield from _ended(folder, count, random.Random(seed), [signal.SIGKILL])


def interrupted(folder: Path, count: int, seed: int) -> Iterator[Verdict]:
    """SIGINT and SIGTERM at random moments."""
    yield from _ended(folder, count, random.Random(seed), [signal.SIGINT, signal.SIGTERM])


def _ended(folder: Path, count: int, rng: random.Random, numbers: list[signal.Signals]) -> Iterator[Verdict]:
    expected, seconds = reference(folder)
    for attempt in range(count):
        number = rng.choice(numbers)
        running = sandbox.start(COMMAND, folder)
        moment = rng.random() * seconds
        while time.monotonic() - running.started < moment and not _over(running):
            time.sleep(0.005)
        sent = time.monotonic()
        running.signal(number)
        done = running.finish()
        waited = time.monotonic() - sent
        told = f"{number.name} after {moment:.2f} s: exit code {done.code} {waited:.1f} s later"
        right = (-9, 0) if number == signal.SIGKILL else (128 + number, 0)
        faults = (
            [] if done.code in right else [f"exit code {done.code}, expected {right[0]}: {done.err[-300:]}"]
        )
        if waited > _ENDS_WITHIN:
            faults.append(f"{waited:.1f} s until it ended")
        if "Traceback" in done.out + done.err:
            faults.append(f"traceback: {(done.out + done.err)[-1500:]}")
        if done.code == 0 or attempt == count - 1:
            faults += _finished(folder, expected)
        yield told, "; ".join(faults) or None


def _over(running: sandbox.Running) -> bool:
    state = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "Z"


def _finished(folder: Path, expected: dict[str, object]) -> list[str]:
    """Let a run come to its end and compare; the next one begins anew."""
    done = sandbox.run(COMMAND, folder, seconds=600)
    faults = done.faults(0, cpu=600)
    if not faults:
        left = workspace.result(folder / "out")
        faults = [f"{name} differs" for name in expected if left.get(name) != expected[name]]
    shutil.rmtree(folder / "out", ignore_errors=True)
    return faults


def flipped(folder: Path) -> Iterator[Verdict]:
    """A byte of the newest checkpoint changes: it is noticed, and the one before is offered and serves."""
    expected, _ = reference(folder)
    sandbox.run([*COMMAND, "train.export=false"], folder, seconds=600)
    newest = folder / "out" / "checkpoints" / str(workspace.STEPS)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 100)
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    done = sandbox.run(COMMAND, folder, seconds=600)
    faults = done.faults(2, cpu=60)
    if f"delete that folder to resume from step {workspace.STEPS - 1}" not in done.err:
        faults.append(f"the one before is not offered: {done.err}")
    yield "a flipped byte in the newest checkpoint", "; ".join(faults) or None
    shutil.rmtree(newest)
    yield "and the one before it serves", "; ".join(_finished(folder, expected)) or None


def twins(folder: Path) -> Iterator[Verdict]:
    """Two processes at once, on two folders and on the same one."""
    expected, _ = reference(folder)
    both = [sandbox.start([*COMMAND, f"output_dir={name}"], folder) for name in ("one", "two")]
    faults = []
    for running, name in zip(both, ("one", "two"), strict=True):
        done = running.finish(600)
        faults += [f"{name}: {fault}" for fault in done.faults(0, cpu=600)]
        left = workspace.result(folder / name) if not faults else {}
        faults += [
            f"{name}: {key} differs" for key in expected if not faults and left.get(key) != expected[key]
        ]
        shutil.rmtree(folder / name, ignore_errors=True)
    yield "two runs in two folders", "; ".join(faults) or None
    first = sandbox.start(COMMAND, folder)
    while not (folder / "out" / "metrics.jsonl").exists() and not _over(first):
        time.sleep(0.01)
    second = sandbox.run(COMMAND, folder, seconds=600)
    faults = second.faults(2, cpu=60)
    if "in use by process" not in second.err:
        faults.append(f"not told that the folder is in use: {second.err}")
    faults += first.finish(600).faults(0, cpu=600)
    yield "two runs in one folder", "; ".join([*faults, *_finished(folder, expected)]) or None


def full_disk(folder: Path) -> Iterator[Verdict]:
    """A small tmpfs fills up at each kind of write: one line, the state before is valid, and it goes on."""
    expected, _ = reference(folder)
    disk = folder / "disk"
    disk.mkdir()
    size = _bytes_of_a_run(folder)
    if not _mounted(disk, 4 * size):
        yield "a full disk: not tried, this user cannot mount a tmpfs", None
        return
    try:
        for left in (0, 2 * _PAGE, 4 * _PAGE, size // 8, size // 3, size // 2):
            yield _fill_and_free(folder, disk, left, expected)
        done = sandbox.run([*_ON_DISK, "train.export=false"], folder, seconds=600)
        yield "a run without an export, which fits", "; ".join(done.faults(0, cpu=600)) or None
        yield _fill_and_free(folder, disk, 4 * _PAGE, expected)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


_ON_DISK = [*COMMAND, "output_dir=disk/out"]
_PAGE = 4096


def _bytes_of_a_run(folder: Path) -> int:
    sandbox.run(COMMAND, folder, seconds=600)
    size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    shutil.rmtree(folder / "out")
    return size


def _mounted(disk: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _fill_and_free(folder: Path, disk: Path, left: int, expected: dict[str, object]) -> Verdict:
    """Leave so many bytes; the run fails. Free the rest; the same command comes to the same end."""
    filler = disk / "filler"
    _fill(filler, shutil.disk_usage(disk).free - left)
    done = sandbox.run(_ON_DISK, folder, seconds=600)
    faults = done.faults(2, cpu=600)
    filler.unlink()
    faults += sandbox.run(_ON_DISK, folder, seconds=600).faults(0, cpu=600)
    if not faults:
        there = workspace.result(disk / "out")
        faults += [f"{name} differs" for name in expected if there.get(name) != expected[name]]
    shutil.rmtree(disk / "out", ignore_errors=True)
    return f"a disk with {left:,} bytes left: {done.err.strip()}", "; ".join(faults) or None


def _fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(max(0, size) // 4096):
            file.write(bytes(4096))


ATTACKS: dict[str, Callable[[Path], Iterator[Verdict]]] = {
    "flipped": flipped,
    "twins": twins,
    "disk": full_disk,
}
