"""Where compiled functions are kept from one run of the tests to the next, also for other clones of the repository.

jax's own bound (``jax_compilation_cache_max_size``) reads the whole folder for every function that it adds, under one
lock, which takes longer than compiling. Here old entries go once, when all tests have run.
"""

import hashlib
import os
import platform
import time
from importlib import metadata
from pathlib import Path

MOST_BYTES = 1 << 30
"""A run of all tests takes 100 MB."""

RECENT = 24 * 3600
"""Seconds since the last use of an entry in which it stays in any case: other tests may be running."""


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmoe" / "compiled-tests"


def folder() -> Path:
    """One for each jaxlib and kind of CPU: XLA compiles for the instructions of the one that it runs on."""
    processor = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = ("flags", "Features", "model name")
        processor += "".join(sorted({line for line in lines if line.startswith(kinds)}))
    digest = hashlib.sha256(processor.encode()).hexdigest()[:12]
    return _root() / f"jaxlib-{metadata.version('jaxlib')}-{digest}"


def prune() -> None:
    """Remove what was not used for longest until the rest is no more than `MOST_BYTES`."""
    entries = []
    for path in _root().glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run was faster
            continue
        entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in entries) - MOST_BYTES
    for used, size, path in sorted(entries):
        if excess <= 0 or used > time.time() - RECENT:
            break
        path.unlink(missing_ok=True)
        excess -= size
