"""Peak memory of a QLoRA run against what XLA plans for its step.

    python benchmarks/qlora_memory.py                  # a checkpoint of 2.4 GB is made up for it
    python benchmarks/qlora_memory.py --quick          # of four layers instead of ten

A process of its own compiles the step of the run, as the trainer does before it reads a weight, and prints the plan:
what the step is given, gives back and computes on the way. Then it reads the checkpoint, quantising it tensor by
tensor, and takes steps. On a CPU the memory of the device is that of the process: the peak counts from what it holds
before the first weight is read. On a GPU it is what the device says. The aim is that the peak of the steps is within
10 % of the plan.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoint_memory
from data_memory import status

MB = 1e6
LIMIT = 0.1
STEPS = 3
ADAPTER = {
    "rank": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def measure(folder: str, kind: str, rows: int, length: int) -> dict[str, Any]:
    """Bytes of one run, in a process of its own.

    Args:
        folder: the checkpoint.
        kind: of its frozen weights, as `model.quantization` calls it.
        rows: of a step.
        length: of a row, in tokens.
    """
    import jax
    import numpy as np

    from jaxmoe.config import RunConfig
    from jaxmoe.model.batch import learning_batch
    from jaxmoe.parallel.sharding import make_mesh
    from jaxmoe.run.assemble import assemble
    from jaxmoe.training.step import TrainStep

    config = RunConfig.from_mapping(
        {
            "model": {"path": folder, "quantization": kind},
            "adapter": ADAPTER,
            "data": {"path": "python:stdlib", "sequence_length": length},
            "optimizer": {"learning_rate": 1e-4},
            "train": {"steps": STEPS, "batch_size": rows},
            "output_dir": "never-made",
        }
    )
    assembled = assemble(config, make_mesh(devices=jax.devices()[:1]))
    compiled = assembled.lower().compile()
    analysis = compiled.memory_analysis()
    given_back = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    plan = analysis.argument_size_in_bytes + given_back + analysis.temp_size_in_bytes
    tokens = np.random.default_rng(0).integers(0, assembled.spec.vocab_size, (rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = jax.tree.map(
        lambda array: array[None], learning_batch(tokens, positions, np.ones_like(positions))
    )
    peak = _Peak(assembled.device.platform)
    with jax.set_mesh(assembled.mesh):
        state = assembled.begin(assembled.initial_weights.make())
        loading = peak.beyond()
        peak.reset()
        placed = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, assembled.batch))
        step = TrainStep(compiled)
        for _ in range(STEPS):
            state, metrics = step(state, placed)
        loss = float(metrics["loss"])
    return {
        "state": analysis.argument_size_in_bytes,
        "plan": plan,
        "loading": loading,
        "steps": peak.beyond(),
        "loss": loss,
    }


class _Peak:
    """The most memory since it was made or reset, beyond what there was when it was made, in bytes."""

    def __init__(self, platform: str) -> None:
        self._on_cpu = platform == "cpu"
        self._idle = status("VmRSS") * MB if self._on_cpu else 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew; the peak of a GPU cannot be."""
        if self._on_cpu:
            Path("/proc/self/clear_refs").write_text("5")

    def beyond(self) -> float:
        if self._on_cpu:
            return status("VmHWM") * MB - self._idle
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def in_process(folder: Path, kind: str, rows: int, length: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    call = [sys.executable, "-W", "ignore", __file__, "--measure", str(folder), kind, str(rows), str(length)]
    text = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(text.splitlines()[-1])


def row(kind: str, rows: int, length: int, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "weights": kind,
        "tokens": rows * length,
        "state, MB": found["state"] / MB,
        "plan, MB": found["plan"] / MB,
        "peak of loading, MB": found["loading"] / MB,
        "peak of steps, MB": found["steps"] / MB,
        "over plan": found["steps"] / found["plan"],
        "within 10 %": abs(found["steps"] / found["plan"] - 1) <= LIMIT,
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, nothing written")
    parser.add_argument(
        "--measure", nargs=4, metavar=("FOLDER", "KIND", "ROWS", "LENGTH"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measure:
        folder, kind, *numbers = options.measure
        print(json.dumps(measure(folder, kind, *map(int, numbers))))
        return
    from common import print_table, write_results

    checkpoint_memory.CONFIG["num_hidden_layers"] = 4 if options.quick else 10
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint_memory.make_checkpoint(folder, True, int(450 * MB))
        for kind, count, length in (("nf4", 4, 1024), ("nf4", 1, 4096), ("int8", 4, 1024)):
            rows.append(row(kind, count, length, in_process(folder, kind, count, length)))
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    if not options.quick:
        print(write_results("qlora_memory", rows, config=checkpoint_memory.CONFIG, adapter=ADAPTER))


if __name__ == "__main__":
    main()
