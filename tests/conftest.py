"""Settings that must stand before jax is imported, and what runs where."""

import gc
import importlib
import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from helpers import compilation_cache, devices

HAS_TORCH = importlib.util.find_spec("torch") is not None
WITHOUT_TORCH = (
    "torch is not installed: tests marked 'torch' (comparisons with transformers' models) are deselected"
)

NOT_ONCE = "not once"
WITHOUT_ONCE = "tests marked 'once' are deselected: they depend on the version of neither jax nor Python"
SECONDS_WORTH_A_LIST = 20

# Whoever starts the tests in the background may have had them ignore interrupts, and with them what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimiser takes half of the time of all tests, and MLIR's emitters of fusions half of what is left. The pass on
# the newest jax, which has no torch, compiles what computes as it is compiled for users: `OPTIMISED`.
UNOPTIMISED = (
    ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"] if HAS_TORCH else []
)
# Eight devices take turns on few cores: XLA's 40 seconds for all of them to reach a collective are not enough
# on a busy machine, and it then aborts the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *UNOPTIMISED,
        os.environ.get("XLA_FLAGS", ""),
        devices.xla_flags(8),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache.folder()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # torch's threads, without the seconds that importing it here costs

# A command that a test runs in this process leaves malloc alone then (`jaxmoe.heap`): a worker would keep its peak.
os.environ.setdefault("MALLOC_ARENA_MAX", "8")

STRICT = True
"""Whether axes that jax.numpy would add are errors, and shapes and dtypes of annotations are checked at every call."""

if STRICT:
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # also of the commands that tests start
    importlib.import_module("helpers.strict").install()

TESTS = Path(__file__).parent
OPTIMISED = ("kernels", "model", "training", "optim", "parallel", "test_train.py")
"""Tests that the optimiser's numbers matter to. Others are of what is read, written, refused or put together."""

MOST_MAPPINGS = 30_000
"""Of memory in a process: Linux allows 65,530, each compiled function takes some, and XLA crashes without."""


def optimise(on: bool) -> None:
    """From now on in this process. What was compiled otherwise is forgotten, so that no test depends on others."""
    import jax

    if jax.config.read("jax_disable_most_optimizations") == on:
        jax.config.update("jax_disable_most_optimizations", not on)
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not HAS_TORCH:
        optimise(item.path.relative_to(TESTS).parts[0] in OPTIMISED)


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For what a function says of wrong operands itself: where tests are strict, its annotations would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_report_header() -> str | None:
    return None if HAS_TORCH else WITHOUT_TORCH


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_TORCH:
        return
    left_out = [item for item in items if item.get_closest_marker("torch")]
    items[:] = [item for item in items if not item.get_closest_marker("torch")]
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        compilation_cache.prune()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # The header is not shown under -q; the reasons must be.
    if not HAS_TORCH:
        terminalreporter.write_line(WITHOUT_TORCH)
    if terminalreporter.config.getoption("markexpr") == NOT_ONCE:
        terminalreporter.write_line(WITHOUT_ONCE)
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if sum(seconds.values()) > SECONDS_WORTH_A_LIST:
        terminalreporter.section("slowest files")
        for file, total in seconds.most_common(15):
            terminalreporter.write_line(f"{total:7.1f} s  {file}")
