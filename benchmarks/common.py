"""What every benchmark shares: the environment, a table on the terminal, results as JSON."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """Device, its load, versions and date: what a figure means nothing without."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "platform": device.platform,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "device_count": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "tokamax") if name in sys.modules},
    }


def variables() -> dict[str, str]:
    """Variables of the environment that are set and change how many threads compute or how memory is allocated."""
    wanted = (
        "XLA_FLAGS",
        "LD_PRELOAD",
        "KMP_AFFINITY",
        "KMP_BLOCKTIME",
        "GOMP_CPU_AFFINITY",
        "GLIBC_TUNABLES",
    )
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in wanted
        or name.endswith("_NUM_THREADS")
        or name.startswith(("MALLOC_", "OMP_", "OPENBLAS_", "MKL_"))
    }


def write_results(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS, **extra: Any) -> Path:
    """Write {name}_{platform}.json in `folder`: the environment, `extra` and the rows; return its path."""
    about = environment()
    path = folder / f"{name}_{about['platform']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": about, **extra, "rows": list(rows)}, indent=1) + "\n")
    return path


def read_results(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of a file that `write_results` wrote today on such a machine, with these versions; else none."""
    about = environment()
    path = folder / f"{name}_{about['platform']}.json"
    content = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}
    same = ("date", "device", "python", "jax", "jaxlib")
    return content["rows"] if all(content["environment"].get(key) == about[key] for key in same) else []


def ceilings(
    dtype: str, *, clock: Callable[[], float] = time.perf_counter, quick: bool = False
) -> dict[str, float]:
    """Rates that nothing here exceeds: of a square matmul and of a copy, counting bytes read and written.

    Args:
        dtype: of the matmul.
        clock: seconds.
        quick: of small ones, which say little.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, copied = (2048, 1 << 26) if on_cpu else (8192, 1 << 30)
    if quick:
        size, copied = 128, 1 << 16
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    matmul = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    # In place: what is measured is not how fast a kernel maps and clears the pages of another result.
    increment = jax.jit(lambda values: values + 1, donate_argnums=0)
    box = [jnp.arange(copied, dtype=jnp.uint32)]

    def copy() -> jax.Array:
        box[0] = increment(box[0])
        return box[0]

    return {
        "matmul TFLOP/s": 2 * size**3 / _best_seconds(clock, matmul, a, b) / 1e12,
        "copy GB/s": 2 * 4 * copied / _best_seconds(clock, copy) / 1e9,
    }


def _best_seconds(clock: Callable[[], float], function: Any, *arguments: jax.Array) -> float:
    """Of one of several calls at once, after a warm-up."""
    count = 2 if jax.default_backend() == "cpu" else 20
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = clock()
        for _ in range(count):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((clock() - start) / count)
    return min(times)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that have the same keys, with rich where it is installed."""
    if not rows:
        return
    header = list(rows[0])
    cells = [[_format(row[key]) for key in header] for row in rows]
    right = [not isinstance(rows[0][key], str) for key in header]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
        for line in [header, *cells]:
            aligned = zip(line, widths, right, strict=True)
            print(
                "  ".join(
                    cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in aligned
                )
            )
        return
    table = Table()
    for key, is_right in zip(header, right, strict=True):
        table.add_column(key, justify="right" if is_right else "left", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    console = Console()
    # Written to a file there is no terminal width to keep to.
    Console(width=console.width if console.is_terminal else 200).print(table)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
