"""Does compile time grow with depth? Trace and compile one training step of a 4- and a 48-layer model.

python benchmarks/compile_time.py
"""

import argparse
import time
from typing import Any

import jax
from common import print_table, write_results

from jaxmoe.config import RunConfig
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run.assemble import assemble

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def measure(depth: int, optimizer_name: str) -> dict[str, Any]:
    """Seconds to trace and to compile a step of `depth` layers; nothing is allocated or run."""
    config = RunConfig.from_mapping(
        {
            "model": {"config": {**CONFIG, "num_hidden_layers": depth}, "dtype": "float32"},
            "data": {"path": "python:stdlib", "sequence_length": 256},
            "optimizer": {"name": optimizer_name, "learning_rate": 1e-3},
            "balance": {"aux_loss": 0.01, "z_loss": 0.001},
            "train": {"steps": 100, "batch_size": 4},
            "output_dir": "never-made",
        }
    )
    assembled = assemble(config, make_mesh())
    start = time.perf_counter()
    lowered = assembled.lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return {
        "optimizer": optimizer_name,
        "layers": depth,
        "trace_s": traced - start,
        "compile_s": done - traced,
        "total_s": done - start,
        "program_mb": len(compiled.as_text()) / 1e6,
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="alternating; the median is reported")
    options = parser.parse_args()
    rows = []
    for name in ("adamw", "muon"):
        measure(4, name)  # what is imported and cached once is not counted
        runs = [(measure(4, name), measure(48, name)) for _ in range(options.repeats)]
        shallow, deep = (
            sorted(side, key=lambda run: run["total_s"])[len(side) // 2] for side in zip(*runs, strict=True)
        )
        rows += [shallow | {"ratio": 1.0}, deep | {"ratio": deep["total_s"] / shallow["total_s"]}]
    print_table(rows)
    print(write_results("compile_time", rows, config=CONFIG, repeats=options.repeats))


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
