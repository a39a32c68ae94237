"""Where a training step on a CPU goes: each part of it, its floor, and transformers on torch beside it.

    python benchmarks/step_parts.py            # needs torch (extra "torch")
    python benchmarks/step_parts.py --model quickstart --cores 1 --repeats 3

Sizes, weights, tokens and AdamW are those of `train_step.py`, in float32. Every part is computed by itself, by what the
step of each library calls for it: of a layer for the first one, forward and backward in one unless it says so. "ms" is
the least time of one, "a step" is how often a step has it. On one core the time is the process's, which neighbours on
that core do not add to; on several it is that of the clock. The rest is the whole step without its parts: copies
between them, residual sums, page faults, cores without work; where it is negative, the step shares or fuses what the
parts do each.

A floor is the time of the FLOPs at the rate of a large matmul of XLA, or of the bytes at the rate of a large copy, both
measured on as many cores in the same process; `parts_counts.py` says what is counted. torch's experts are grouped_mm or
eager, whichever is faster here; its attention is sdpa.

Both libraries count cores when they start, so each number of cores is a process of its own that is bound to as many.
There ours and torch's take turns, so that a drift of the machine hits both. "faults" are page faults of one computation
(the median), each a page of memory that the kernel maps and clears.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import parts_counts
import parts_ours
import parts_torch
import torch
import transformers
from common import ceilings, print_table, variables, write_results
from parts_counts import COUNTED, INSIDE, LEFT, REST, WHOLE, Shape
from train_step import LENGTH, SIZES, VOCAB, jax_step, resized, torch_model, torch_step

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "top_k": 2,
    "batch": 2,
}
TINY_LENGTH = 32

Figures = dict[str, float]


def shape_of(size: dict[str, int], model: Any, length: int) -> Shape:
    """Of a step."""
    config = model.config
    return Shape(
        batch=size["batch"],
        length=length,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        hidden=config.moe_intermediate_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def clock() -> float:
    """Seconds: on one core those of this process, on several those that pass."""
    return time.process_time() if len(os.sched_getaffinity(0)) == 1 else time.perf_counter()


def in_turn(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Figures]:
    """Least and median ms, and page faults, of each, after two warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    faults: dict[str, list[int]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
        call()
    for _ in range(repeats):
        for name, call in contestants.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = clock()
            call()
            seconds[name].append(clock() - start)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        name: {
            "ms": 1e3 * min(seconds[name]),
            "median ms": 1e3 * statistics.median(seconds[name]),
            "faults": statistics.median(faults[name]),
        }
        for name in contestants
    }


def measure_here(name: str, length: int, repeats: int) -> dict[str, Any]:
    """Figures of every part and of the whole step on this process's cores, and the rates of its floors."""
    size = TINY if name == "tiny" else resized(SIZES[name], length)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size["batch"], length))
    model = torch_model(size)
    rates = ceilings("float32", clock=clock, quick=name == "tiny")
    ours = parts_ours.calls(model, tokens)
    theirs, experts = parts_torch.calls(model, tokens)
    parts = {}
    for part, call in ours.items():
        parts[part] = in_turn({"jaxmoe": call, "torch": theirs[part]}, repeats)
        times = ", ".join(f"{who} {figures['ms']:.1f} ms" for who, figures in parts[part].items())
        print(f"{name}, cores {cores}: {part}: {times}", file=sys.stderr, flush=True)
    whole = {
        "jaxmoe": jax_step(torch_model(size), tokens),
        "torch": torch_step(torch_model(size), "sdpa", experts, tokens),
    }
    parts[WHOLE] = in_turn(whole, repeats)
    shape = vars(shape_of(size, model, length))
    return {"shape": shape, "rates": rates, "torch experts": experts, "parts": parts}


def measure(name: str, cores: int, length: int, repeats: int) -> dict[str, Any]:
    """`measure_here` in a process that begins on `cores` of the cores that this one may use."""
    own = os.sched_getaffinity(0)
    command = [sys.executable, __file__, "--here", name, "--length", str(length), "--repeats", str(repeats)]
    os.sched_setaffinity(0, sorted(own)[:cores])  # what is started now inherits it
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    finally:
        os.sched_setaffinity(0, own)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per part, the whole step, and the rest."""
    shape = Shape(**found["shape"])
    counts, measured = parts_counts.least(shape), found["parts"]
    for part, (whole, others) in LEFT.items():
        measured = measured | {part: _minus(measured[whole], [(1, measured[other]) for other in others])}
    order = [
        line for part in COUNTED for line in (part, *(inner for inner, of in INSIDE.items() if of == part))
    ]
    rows = []
    for part in order:
        times = shape.layers if COUNTED[INSIDE.get(part, part)] else 1
        rows.append(_row(part, times, measured[part], counts[part].ms(found["rates"]), measured[WHOLE]))
    counted = [(shape.layers if in_layers else 1, measured[part]) for part, in_layers in COUNTED.items()]
    rest = _minus(measured[WHOLE], counted)
    floor = parts_counts.whole_floor_ms(shape, found["rates"])
    rows.append(_row(REST, 1, rest, {}, measured[WHOLE]))
    rows.append(_row(WHOLE, 1, measured[WHOLE], floor, measured[WHOLE]))
    return rows


def _minus(whole: dict[str, Figures], parts: list[tuple[int, dict[str, Figures]]]) -> dict[str, Figures]:
    """What of every figure is left of a whole, given parts and how often it has each."""
    return {
        who: {
            key: value - sum(times * part[who][key] for times, part in parts)
            for key, value in figures.items()
        }
        for who, figures in whole.items()
    }


def _row(
    part: str, times: int, measured: dict[str, Figures], floors: Figures, whole: dict[str, Figures]
) -> dict[str, Any]:
    ours, theirs = measured["jaxmoe"], measured["torch"]
    floor = floors.get("both", max(floors.values(), default=0.0))
    return {
        "part": part,
        "a step": times,
        "ms": ours["ms"],
        "median": ours["median ms"],
        "FLOPs floor": floors.get("flops"),
        "bytes floor": floors.get("bytes"),
        "x floor": ours["ms"] / floor if floor else None,
        "torch ms": theirs["ms"],
        "torch median": theirs["median ms"],
        "x torch": ours["ms"] / theirs["ms"] if min(ours["ms"], theirs["ms"]) > 0 else None,
        "share %": 100 * times * ours["ms"] / whole["jaxmoe"]["ms"],
        "torch share %": 100 * times * theirs["ms"] / whole["torch"]["ms"],
        "faults": int(ours["faults"]),
        "torch faults": int(theirs["faults"]),
    }


def main() -> None:
    """The benchmark."""
    available = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, action="append")
    parser.add_argument(
        "--cores", type=int, nargs="+", default=sorted({1, available}), help="by default 1 and all"
    )
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a row, by default {LENGTH}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: seconds")
    parser.add_argument("--here", choices=[*SIZES, "tiny"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.length < 1 or options.repeats < 1:
        parser.error(f"--length {options.length}, --repeats {options.repeats}: expected 1 or more")
    if options.here:
        print(json.dumps(measure_here(options.here, options.length, options.repeats)))
        return
    if not all(1 <= cores <= available for cores in options.cores):
        parser.error(f"--cores {options.cores}: this process may use {available}")
    names, length, repeats = options.model or list(SIZES), options.length, options.repeats
    if options.quick:
        names, length, repeats = ["tiny"], TINY_LENGTH, 1
    rows = []
    rates = {}
    for name in names:
        for cores in options.cores:
            found = measure(name, cores, length, repeats)
            rates[f"{name}, {cores}"] = found["rates"] | {"torch experts": found["torch experts"]}
            print(f"\n{name}, cores: {cores}, {found['rates']}, torch's experts: {found['torch experts']}")
            lines = table(found)
            print_table(lines)
            rows += [{"model": name, "cores": cores} | line for line in lines]
    print("variables:", " ".join(f"{name}={value}" for name, value in variables().items()) or "none set")
    suffix = "_quick" if options.quick else "" if length == LENGTH else f"_{length}"
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "variables": variables(),
        "sequence_length": length,
        "repeats": repeats,
        "rates": rates,
    }
    print(write_results(f"step_parts{suffix}", rows, **about))


if __name__ == "__main__":
    main()
