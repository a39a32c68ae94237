"""The experts of a layer, forward and forward+backward, trained in full and by LoRA, beside peers and the floor.

    python benchmarks/moe_layer.py [--quick] [--seconds 300] [--resume] [--output FOLDER]

Contestants of a line run alternately in this process: ours; the same on our portable backend; on jax.lax.ragged_dot; on
tokamax's ragged_dot and on torch's grouped_mm where those are installed. All of them sort by expert, gather and combine
in the timed part. On an accelerator a time is the median of runs of several launches at once, so that the host's share
is hidden; on a CPU the best time. The floor is the larger of operations and bytes (`moe_counts.py`) at the rates of a
matmul and a copy measured in the same run. Results are written after every line.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import moe_peers
import numpy as np
from common import RESULTS, ceilings, print_table, read_results, write_results
from moe_counts import CPU_TARGETS, GPU_TARGETS, RANK, Line, targets_table
from moe_peers import Inputs

from jaxmoe.kernels.devices import device_at_hand
from jaxmoe.kernels.expert_mlp import Experts, Lora, expert_mlp
from jaxmoe.kernels.expert_mlp.specs import LAYERS, ExpertLayer, ExpertShape, choose_experts, layer_of

SCALE = 2.0
"""Of LoRA."""

PASSES = {"fwd": False, "fwd+bwd": True}

CPU_LAYERS = (
    ExpertLayer(ExpertShape("cpu, 16 experts", d_model=512, d_hidden=512, experts=16, top_k=4)),
    ExpertLayer(ExpertShape("cpu, 64 experts", d_model=256, d_hidden=256, experts=64, top_k=8)),
)


class Contestant(Protocol):
    """One way to compute a line."""

    def sample(self, count: int) -> float: ...
    def peak_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function and its arguments."""

    run: Any
    arguments: tuple[Any, ...]

    def sample(self, count: int) -> float:
        """Seconds of one of `count` calls, launched without waiting in between."""
        start = time.perf_counter()
        for _ in range(count):
            out = None  # its memory may be used again before the next call
            out = self.run(*self.arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    def peak_bytes(self) -> int:
        """Most memory of a call, beyond its operands, as XLA plans it."""
        memory = self.run.memory_analysis()
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def lines_to_measure(on_cpu: bool, quick: bool) -> list[Line]:
    """The most important first."""
    if on_cpu:
        tokens, routings = (256, ("balanced",)) if quick else (1024, ("balanced", "zipf", "half_empty"))
        return [Line(layer, tokens, routing) for layer in CPU_LAYERS for routing in routings]
    qwen, mixtral = layer_of("Qwen3-30B-A3B"), layer_of("Mixtral-8x7B")
    first = [
        Line(qwen, 8192, "balanced"),
        Line(qwen, 32768, "balanced"),
        Line(mixtral, 8192, "balanced"),
        Line(qwen, 8192, "zipf"),
        Line(qwen, 8192, "half_empty"),
    ]
    if quick:
        return first[:1]
    # Small ones before those of many gigabytes.
    layers = sorted(
        LAYERS, key=lambda layer: layer.shape.experts * layer.shape.d_model * layer.shape.d_hidden
    )
    rest = [
        Line(layer, tokens, routing)
        for routing in ("balanced", "zipf", "half_empty")
        for tokens in (8192, 16384, 32768)
        for layer in layers
    ]
    return [*first, *(line for line in rest if line not in first)]


def make_inputs(line: Line, dtype: str) -> Inputs:
    """Random, with biases where the model has them, and LoRA."""
    shape, parts = line.layer.shape, line.layer.activation.parts
    experts, width, hidden = shape.experts, shape.d_model, shape.d_hidden
    keys = iter(jax.random.split(jax.random.key(0), 16))

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, size: float, sizes: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, sizes, dtype) * jnp.asarray(size, dtype)

    def normal(size: float, *sizes: int) -> jax.Array:
        return draw(next(keys), size, sizes)

    lora = Lora(
        normal(width**-0.5, experts, RANK, width),
        normal(RANK**-0.5, experts, parts, hidden, RANK),
        normal(hidden**-0.5, experts, RANK, hidden),
        normal(RANK**-0.5, experts, width, RANK),
    )
    biases = [None, None]
    if line.layer.bias:
        biases = [normal(0.1, experts, parts, hidden), normal(0.1, experts, width)]
    chosen = choose_experts(line.routing, line.tokens, experts, shape.top_k)
    weights = np.random.default_rng(0).uniform(0.1, 1.0, chosen.shape).astype(np.float32)
    return Inputs(
        x=normal(1.0, line.tokens, width),
        experts=Experts(
            normal(width**-0.5, experts, parts, hidden, width),
            normal(hidden**-0.5, experts, width, hidden),
            *biases,
            lora,
        ),
        weights=jnp.asarray(weights / weights.sum(axis=1, keepdims=True)),
        chosen=jnp.asarray(chosen),
        dout=normal(1.0, line.tokens, width),
    )


def compiled(function: Callable[..., jax.Array], inputs: Inputs, weights: str, backward: bool) -> Compiled:
    """`function(x, experts, weights, chosen)`, or that and its gradients in what is trained, x and weights."""
    full = weights == "full"
    experts = inputs.experts._replace(lora=Lora()) if full else inputs.experts

    def both(x: Any, experts: Experts, weights: Any, chosen: Any, dout: Any) -> Any:
        def of(x: Any, trained: Any, weights: Any) -> jax.Array:
            return function(x, trained if full else experts._replace(lora=trained), weights, chosen)

        out, pull_back = jax.vjp(of, x, experts if full else experts.lora, weights)
        return out, pull_back(dout)

    arguments = (inputs.x, experts, inputs.weights, inputs.chosen)
    if backward:
        arguments = (*arguments, inputs.dout)
    run = jax.jit(both if backward else function).lower(*arguments).compile()
    return _that_fits(Compiled(run, arguments))


def _that_fits(contestant: Compiled) -> Compiled:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    in_use = sum(array.nbytes for array in jax.live_arrays())
    need = contestant.peak_bytes()
    if limit and in_use + need > 0.95 * limit:
        raise MemoryError(f"needs {need / 1e9:.1f} GB beside {in_use / 1e9:.1f} in use, of {limit / 1e9:.1f}")
    return contestant


@dataclasses.dataclass
class Field:
    """Contestants of a line: makers by name, given "full" or "lora" and whether there is a backward pass."""

    line: Line
    dtype: str

    def __post_init__(self) -> None:
        self.inputs = make_inputs(self.line, self.dtype)
        self._turned: Inputs | None = None

    def names(self, weights: str) -> list[str]:
        if jax.default_backend() == "cpu":
            return ["ours", "ragged_dot", "dense"]
        names = ["ours", "torch", *moe_peers.tokamax_products()]
        # These take long, to compile or to run, and how tokens are spread makes little difference to them.
        if self.line.routing == "balanced" and weights == "full":
            names += ["ragged_dot", *(["portable"] if self.line.tokens == 8192 else [])]
        return names

    def make(self, name: str, weights: str, backward: bool) -> Contestant:
        activation, inputs = self.line.layer.activation, self.inputs
        if name in ("ours", "portable"):
            chosen_backend = "mosaic" if device_at_hand().hopper else None
            backend = "xla" if name == "portable" else chosen_backend
            ours = partial(expert_mlp, activation=activation, lora_scale=SCALE, backend=backend)
            return compiled(
                lambda x, experts, weights, chosen: ours(x, experts, chosen, weights),
                inputs,
                weights,
                backward,
            )
        if name == "torch":
            import moe_torch

            return moe_torch.make(inputs, activation, SCALE, weights, backward)
        if name == "dense":
            return compiled(
                partial(moe_peers.dense_layer, activation, SCALE), self._dense_inputs(), weights, backward
            )
        products = {"ragged_dot": moe_peers.ragged_dot, **moe_peers.tokamax_products()}
        layer = partial(moe_peers.layer, products[name], activation, SCALE)
        return compiled(layer, self._turned_inputs(), weights, backward)

    def _turned_inputs(self) -> Inputs:
        if self._turned is None:
            turned = jax.block_until_ready(jax.jit(moe_peers.turned)(self.inputs.experts))
            self._turned = dataclasses.replace(self.inputs, experts=turned)
        return self._turned

    def _dense_inputs(self) -> Inputs:
        inputs, top_k = self._turned_inputs(), self.line.layer.shape.top_k
        one = jax.tree.map(lambda array: array[:1], inputs.experts)
        rows = lambda array: jnp.repeat(array, top_k, axis=0)
        return dataclasses.replace(inputs, x=rows(inputs.x), experts=one, dout=rows(inputs.dout))


def race(contestants: dict[str, Contestant], seconds: float) -> dict[str, float]:
    """Milliseconds of each, which have run once. They alternate, each for about `seconds` or, if slow, one run."""
    first = {name: contestant.sample(1) for name, contestant in contestants.items()}
    counts = {name: max(1, min(50, int(0.05 / once))) for name, once in first.items()}
    rounds = {name: min(25, int(seconds / (once * counts[name]))) for name, once in first.items()}
    # The one run of a slow contestant counts; of the others it was too short to.
    times = {name: [once] if rounds[name] < 1 else [] for name, once in first.items()}
    for number in range(max(rounds.values())):
        for name, contestant in contestants.items():
            if number < rounds[name]:
                times[name].append(contestant.sample(counts[name]))
    statistic = min if jax.default_backend() == "cpu" else statistics.median
    return {name: 1e3 * statistic(values) for name, values in times.items()}


def measure(
    field: Field, weights: str, passes: str, rates: dict[str, float], seconds: float
) -> dict[str, Any]:
    """One row. A contestant that cannot run is left out, and the reason is kept."""
    line, backward = field.line, PASSES[passes]
    contestants: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    memory: dict[str, float] = {}
    for name in field.names(weights):
        try:
            contestant = field.make(name, weights, backward)
            contestant.sample(1)
            memory[name] = contestant.peak_bytes() / 1e9
            contestants[name] = contestant
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"  {name} is left out ({weights}, {passes}): {left_out[name][:200]}", flush=True)
    times = race(contestants, seconds) if contestants else {}
    ours, flops = times.pop("ours", None), line.flops(weights, backward)
    floor = line.floor_ms(weights, backward, rates, size=jnp.dtype(field.dtype).itemsize)
    shape = line.layer.shape
    row = {
        "model": line.layer.name,
        "D,F,E,K": f"{shape.d_model},{shape.d_hidden},{shape.experts},{shape.top_k}",
        "tokens": line.tokens,
        "routing": line.routing,
        "weights": weights,
        "pass": passes,
        "ms": ours,
        "TFLOP/s": flops / ours / 1e9 if ours else None,
        "floor ms": floor,
        "over floor": ours / floor if ours else None,
        "GB beyond operands": memory.get("ours"),
        "peers ms": times,
        "peers TFLOP/s": {name: flops / value / 1e9 for name, value in times.items()},
        "peers GB beyond operands": {name: memory[name] for name in times},
        "left out": left_out,
    }
    for name, value in times.items():
        if name == "dense":
            row["over dense"] = ours / value if ours else None
        else:
            row[f"x {name}"] = value / ours if ours else None
    return row


def measure_line(line: Line, dtype: str, rates: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """All rows of a line; the backward pass is what it adds to the forward pass."""
    field = Field(line, dtype)
    rows = []
    for weights in ("full", "lora"):
        forward, both = (measure(field, weights, passes, rates, seconds) for passes in PASSES)
        if forward["ms"] and both["ms"] and both["ms"] > forward["ms"]:
            backward = line.flops(weights, True) - line.flops(weights, False)
            both["backward TFLOP/s"] = backward / (both["ms"] - forward["ms"]) / 1e9
        rows += [forward, both]
    full, lora = rows[1], rows[3]
    if full["ms"] and lora["ms"]:
        lora["over full"] = lora["ms"] / full["ms"]
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that fit a terminal; those of the peers are how many times as fast as them ours is."""
    columns = [
        "model",
        "tokens",
        "routing",
        "weights",
        "pass",
        "ms",
        "TFLOP/s",
        "backward TFLOP/s",
        "over floor",
    ]
    columns += ["GB beyond operands", "over full"]
    columns += sorted({name for row in rows for name in row if name.startswith("x ") or name == "over dense"})
    return [{name: row.get(name) for name in columns} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a line or two, few repeats")
    parser.add_argument("--seconds", type=float, default=300.0, help="no line is begun after that many (300)")
    parser.add_argument(
        "--resume", action="store_true", help="keep the lines that today's results have, measure the others"
    )
    parser.add_argument("--dtype", help="float32 on a CPU, else bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()

    start = time.monotonic()
    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    seconds = 0.1 if arguments.quick else 2.0 if on_cpu else 0.4
    name = "moe_layer" + ("_quick" if arguments.quick else "") + (f"_{dtype}" if arguments.dtype else "")
    rates = ceilings(dtype)
    print(", ".join(f"{key} {value:.4g}" for key, value in rates.items()), flush=True)
    rows = read_results(name, arguments.output) if arguments.resume else []
    done = {(row["model"], row["tokens"], row["routing"]) for row in rows}
    lines = [
        line
        for line in lines_to_measure(on_cpu, arguments.quick)
        if (line.layer.name, line.tokens, line.routing) not in done
    ]
    path = None
    for number, line in enumerate(lines):
        if time.monotonic() - start > arguments.seconds:
            print(f"time is up: {len(lines) - number} of {len(lines)} lines are not measured")
            break
        print(f"{line.layer.name}, {line.tokens} tokens, {line.routing}", flush=True)
        new = measure_line(line, dtype, rates, seconds)
        print_table(summary(new))
        rows += new
        not_measured = [
            f"{later.layer.name}, {later.tokens}, {later.routing}" for later in lines[number + 1 :]
        ]
        path = write_results(
            name,
            rows,
            arguments.output,
            dtype=dtype,
            statistic="best time" if on_cpu else "median",
            ceilings=rates,
            not_measured=not_measured,
        )
    print_table(summary(rows))
    print_table(targets_table(CPU_TARGETS if on_cpu else GPU_TARGETS, rows))
    print(path)


if __name__ == "__main__":
    main()
