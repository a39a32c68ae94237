"""What every benchmark shares: the environment, a table on the terminal, results as JSON."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
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
    }


def write_results(name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> Path:
    """Write results/{name}_{platform}.json: the environment, `extra` and the rows; return its path."""
    about = environment()
    path = RESULTS / f"{name}_{about['platform']}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": about, **extra, "rows": list(rows)}, indent=1) + "\n")
    return path


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
