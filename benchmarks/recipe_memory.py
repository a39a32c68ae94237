"""What the recipes under configs/ take of each GPU: their training steps compiled for GPUs that are not there.

    make recipes

XLA's CUDA plugin and cuDNN have to be on the PYTHONPATH and ptxas on the PATH; .ci/compile-recipes sees to that. The
step is the one that the run takes, with cuDNN's attention and our kernels for experts; nothing is allocated or run.
A recipe for one GPU of so many GB is compiled for an H200, too: what is compared with its GB are the bytes. Which
arrays the temporaries are stands in the memory-usage-report.txt that XLA_FLAGS="--xla_dump_to=FOLDER
--xla_dump_hlo_as_text" leaves.

    PYTHONPATH=$(.ci/cuda-compiler .venv/bin/python) .venv/bin/python benchmarks/recipe_memory.py --counts

counts what the quickstart's step has between its products, compiled for one H200 and for the CPU at hand (no cuDNN is
needed): figures that show what a change to it saves on both, however busy the machine is.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",  # the GPUs are not there
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes from there is not compiled
}

import jax
import optax
from common import print_table, write_results
from jax.experimental import topologies

from jaxmoe.config import load_config
from jaxmoe.configs import published
from jaxmoe.interop.source import config_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run.assemble import assemble
from jaxmoe.run.memory import held_bytes

ROOT = Path(__file__).resolve().parent.parent
TARGET = (ROOT / "tests" / "kernels" / "h200.textproto").read_text(encoding="utf-8")
PER_NODE = 8
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("quickstart"))
CALLS = {
    "cuDNN attention": r'custom_call_target="__cudnn\$fmha',
    "expert kernels": r'custom_call_target="mosaic_gpu',
}
"""Custom calls in the compiled program; a layer of a scan is in it once."""


KINDS = ("packed weights", "frozen weights", "trained weights", "optimiser")


def described(count: int) -> Any:
    """H200s that are not there."""
    topology = f"1x{max(1, count // PER_NODE)}x{min(count, PER_NODE)}"
    return topologies.get_topology_desc("", "cuda", target_config=TARGET, topology=topology).devices


def measure(recipe: Path) -> dict[str, Any]:
    """GB per GPU of one recipe's training step, as XLA plans it."""
    config = load_config(recipe)
    model = next((model for model in published().values() if model.hub == config.model.path), None)
    if model is None:
        sys.exit(f"error: {recipe}: configs/published.json has no model {config.model.path!r}: add it there")
    count = config.mesh.batch_shards * config.mesh.tensor
    mesh = make_mesh(**config.mesh.model_dump(), devices=described(count))
    assembled = assemble(config, mesh, source=config_source(model.config))
    start = time.perf_counter()
    compiled = assembled.lower().compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    started, endless = launches(text)
    held = held_bytes(assembled)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    budget = re.search(r"on one GPU of (\d+) GB", recipe.read_text(encoding="utf-8"))
    return {
        "recipe": recipe.stem,
        "GPUs": f"{count} x {assembled.device.kind}",
        "tokens per GPU and pass": config.train.rows
        * config.data.sequence_length
        // config.mesh.batch_shards,
        **{f"{kind}, GB": held.get(kind, 0) / 1e9 for kind in KINDS},
        "arguments, GB": memory.argument_size_in_bytes / 1e9,
        "temporaries, GB": memory.temp_size_in_bytes / 1e9,
        "in all, GB": whole / 1e9,
        "peak, GB": memory.peak_memory_in_bytes / 1e9,
        "budget, GB": None if budget is None else float(budget[1]),
        **{name: len(re.findall(pattern, text)) for name, pattern in CALLS.items()},
        "launches": started,
        "loops without end": endless,
        "compiled in, s": seconds,
    }


LARGE = 2**20
"""Bytes of the smallest array that counts."""

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\])}]) ([a-z][\w-]*)\((.*)$")
_VIEWS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
"""Operations that move nothing themselves."""


def instructions(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """Name, shape, operation and operands of the instructions of each computation in a program that is not fused."""
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    fused |= set(re.findall(r" (?!call\()[\w-]+\(.*to_apply=%?([\w.-]+)", text))
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if not line.startswith(" ") and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].removeprefix("%")
        elif name not in fused and (instruction := _INSTRUCTION.match(line)):
            found.setdefault(name, []).append(instruction.groups())
    return found


def array_bytes(shape: str) -> int:
    """Of large arrays alone, those of a tuple added up."""
    total = 0
    for dtype, sizes in _SHAPE.findall(shape):
        size = math.prod(int(n) for n in sizes.split(",") if n)
        size *= 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype.replace("bf", ""))) // 8
        total += size if size >= LARGE else 0
    return total


def moved_bytes(text: str) -> tuple[int, int]:
    """Kernels that read or write large arrays, and the bytes of these, each operand and result once."""
    kernels, moved = 0, 0
    for of_one in instructions(text).values():
        shapes = {name: shape for name, shape, _, _ in of_one}
        for _, shape, operation, rest in of_one:
            operands = {name for name in re.findall(r"%([\w.-]+)", rest.split("), ")[0]) if name in shapes}
            size = array_bytes(shape) + sum(array_bytes(shapes[name]) for name in operands)
            if operation not in _VIEWS and size:
                kernels, moved = kernels + 1, moved + size
    return kernels, moved


_CALLED = re.compile(
    r"(?:body|to_apply|branch_computations|true_computation|false_computation)=\{?([^,}]*(?:, %[^,}]*)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def launches(text: str) -> tuple[float, int]:
    """Kernels that a program starts, those of a loop as often as it turns, and its loops that nobody can count.

    Of a branch the one with most counts. A loop that nobody can count waits for the device before each turn; its
    kernels count once.
    """
    of_one = instructions(text)
    endless = 0
    started: dict[str, float] = {}

    def inside(name: str) -> float:
        nonlocal endless
        if name in started:
            return started[name]
        total = 0.0
        for _, _, operation, rest in of_one.get(name, []):
            called = [
                inside(each.strip().removeprefix("%"))
                for found in (_CALLED.findall(rest) if operation in ("while", "conditional", "call") else ())
                for each in found.split(",")
            ]
            if operation == "while":
                trips = _TRIPS.search(rest)
                endless += trips is None
                total += (1 if trips is None else int(trips[1])) * sum(called)
            elif operation in ("conditional", "call"):
                total += max(called, default=0.0)
            elif operation not in _VIEWS and not operation.endswith("-done"):
                total += 1
        started[name] = total
        return total

    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    return (inside(entry[1]) if entry else 0.0), endless


def count_optimizer(assembled: Any) -> dict[str, Any]:
    """Clipping and the update by themselves: kernels that touch large arrays, and passes over all parameters."""
    state = assembled.state

    def update(weights: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = assembled.optimizer.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state

    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(state.trainable, state.opt_state, state.trainable)
    kernels, moved = moved_bytes(lowered.compile().as_text())
    whole = sum(
        array_bytes(f"f32[{','.join(map(str, leaf.shape))}]") for leaf in jax.tree.leaves(state.trainable)
    )
    large = sum(leaf.size * 4 >= LARGE for leaf in jax.tree.leaves(state.trainable))
    return {"kernels per parameter": kernels / large, "passes over memory": moved / whole}


def count(target: str) -> dict[str, Any]:
    """What a step of the quickstart has beside its products; with AdamW, whose update is element by element."""
    config = load_config(None, ["optimizer.name=adamw"])
    assembled = assemble(config, make_mesh(devices=described(1) if target == "H200" else jax.devices()[:1]))
    compiled = assembled.lower().compile()
    text = compiled.as_text()
    lines = [line for of_one in instructions(text).values() for line in of_one]
    copies = [array_bytes(shape) for _, shape, operation, _ in lines if operation == "copy"]
    return {
        "compiled for": target,
        **count_optimizer(assembled),
        "kernels": sum(operation not in _VIEWS for _, _, operation, _ in lines),
        "large copies": sum(size > 0 for size in copies),
        "of them, MB": sum(copies) / 1e6,
        "sorts": len(re.findall(r" sort\(", text)),
        "scatters": len(re.findall(r" scatter\(", text)),
        "temporaries, MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*", type=Path, default=RECIPES)
    parser.add_argument(
        "--counts", action="store_true", help="of the quickstart's step instead, also on a CPU"
    )
    options = parser.parse_args()
    if options.counts:
        rows = [count(target) for target in ("H200", "CPU")]
        print_table(rows)
        print(write_results("step_counts", rows, model="quickstart", optimizer="adamw"))
        return
    rows = [measure(recipe) for recipe in options.recipe]
    kinds = [f"{kind}, GB" for kind in KINDS]
    for columns in (kinds, [name for name in rows[0] if name not in ("recipe", *kinds)]):
        print_table([{"recipe": row["recipe"], **{name: row[name] for name in columns}} for row in rows])
    if options.recipe == RECIPES:
        print(write_results("recipe_memory", rows, compiled_for="NVIDIA H200", jax=jax.__version__))


if __name__ == "__main__":
    main()
