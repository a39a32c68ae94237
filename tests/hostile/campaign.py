"""Attack the commands and count what does not hold.

    make hostile                                         # all of it, seven minutes on two cores
    cd tests && python -m hostile.campaign inputs --every 5

Prints every fault and a table; exit code 1 where there is one.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from helpers import compilation_cache, tiny

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache.folder()))

from hostile import endings, inputs, mutations, sandbox, workspace

KILLS, SIGNALS, TENSORS, CONFIGS = 50, 34, 3000, 1500

Verdicts = Iterator[tuple[str, str | None]]


def bad_inputs(folder: Path, every: int) -> Verdicts:
    """Each bad input in a fresh copy of the workspace."""
    for case in inputs.cases()[::every]:
        place = folder.with_name("place")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        if case.damage is not None:
            case.damage(place)
        done = sandbox.run(list(case.command), place, None if case.trains else _do_not_train)
        faults = done.faults(*case.codes, cpu=sandbox.MOST_CPU if case.cpu is None else case.cpu)
        if done.code == 2 and (place / "out" / "export").exists():
            faults.append("exported")
        yield case.name, f"{'; '.join(faults)}: {done.err[-300:]}" if faults else None


def _do_not_train() -> None:
    """Whatever can be checked has been when the loop begins."""
    from jaxmoe.run import loop

    loop.Trainer.run = lambda _: None  # type: ignore[method-assign,assignment]


def mutated_tensors(folder: Path, every: int) -> Verdicts:
    """Mutations of one safetensors file."""
    single = folder.with_name("single")
    tiny.write_checkpoint(single, "qwen3_moe", dtype="float32", shards=1)
    for seed in range(0, TENSORS, every):
        yield f"tensors {seed}", mutations.tensors_verdict(single, seed)


def mutated_configs(folder: Path, every: int) -> Verdicts:
    """Mutations of a config.json."""
    other = 0
    for seed in range(0, CONFIGS, every):
        fault, changed = mutations.config_verdict(folder / "model", seed)
        other += changed
        yield f"config {seed}", fault
    print(f"mutated configs taken for another model: {other}")


def attacks(folder: Path, every: int, seed: int) -> dict[str, Callable[[], Verdicts]]:
    """All attacks by name."""
    return {
        "inputs": lambda: bad_inputs(folder, every),
        "tensors": lambda: mutated_tensors(folder, every),
        "configs": lambda: mutated_configs(folder, every),
        "kills": lambda: endings.killed(folder, KILLS // every, seed),
        "signals": lambda: endings.interrupted(folder, SIGNALS // every, seed),
        **{name: (lambda attack=attack: attack(folder)) for name, attack in endings.ATTACKS.items()},
    }


def main() -> None:
    """The campaign."""
    names = list(attacks(Path(), 1, 0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", choices=[*names, []], help="by default all")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th of the inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills and signals")
    parser.add_argument("--verbose", action="store_true", help="tell also what held")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of libraries, about the models that are damaged on purpose
    sandbox.prepare()
    rows, failed = [], 0
    for name in options.attacks or names:
        with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
            folder = workspace.write(Path(temporary) / "workspace")
            begun, tried, faults = time.monotonic(), 0, 0
            for what, fault in attacks(folder, options.every, options.seed)[name]():
                tried += 1
                faults += fault is not None
                if fault is not None or options.verbose:
                    print(f"{name}: {what}: {fault or 'held'}", flush=True)
            rows.append((name, tried, faults, time.monotonic() - begun))
            failed += faults
    print(f"{'attack':10} {'tried':>6} {'faults':>6} {'seconds':>8}")
    for name, tried, faults, seconds in rows:
        print(f"{name:10} {tried:6} {faults:6} {seconds:8.0f}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
