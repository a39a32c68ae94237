"""What the recipes under configs/ take of each GPU: their training steps compiled for GPUs that are not there.

    make recipes

XLA's CUDA plugin and cuDNN have to be on the PYTHONPATH and ptxas on the PATH; .ci/compile-recipes sees to that. The
step is the one that the run takes, with cuDNN's attention and our kernels for experts; nothing is allocated or run.
"""

import argparse
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
from common import print_table, write_results
from jax.experimental import topologies

from jaxmoe.config import load_config
from jaxmoe.configs import published
from jaxmoe.interop.source import config_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run.assemble import assemble

ROOT = Path(__file__).resolve().parent.parent
TARGET = (ROOT / "tests" / "kernels" / "h200.textproto").read_text(encoding="utf-8")
PER_NODE = 8
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("quickstart"))
CALLS = {
    "cuDNN attention": r'custom_call_target="__cudnn\$fmha',
    "expert kernels": r'custom_call_target="mosaic_gpu',
}
"""Custom calls in the compiled program; a layer of a scan is in it once."""


def measure(recipe: Path) -> dict[str, Any]:
    """GB per GPU of one recipe's training step, as XLA plans it."""
    config = load_config(recipe)
    model = next((model for model in published().values() if model.hub == config.model.path), None)
    if model is None:
        sys.exit(f"error: {recipe}: configs/published.json has no model {config.model.path!r}: add it there")
    count = config.mesh.batch_shards * config.mesh.tensor
    described = topologies.get_topology_desc(
        "", "cuda", target_config=TARGET, topology=f"1x{max(1, count // PER_NODE)}x{min(count, PER_NODE)}"
    ).devices
    mesh = make_mesh(**config.mesh.model_dump(), devices=described)
    assembled = assemble(config, mesh, source=config_source(model.config))
    start = time.perf_counter()
    compiled = assembled.lower().compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return {
        "recipe": recipe.stem,
        "GPUs": f"{count} x {assembled.device.kind}",
        "tokens per GPU and pass": config.train.rows
        * config.data.sequence_length
        // config.mesh.batch_shards,
        "arguments, GB": memory.argument_size_in_bytes / 1e9,
        "temporaries, GB": memory.temp_size_in_bytes / 1e9,
        "in all, GB": whole / 1e9,
        **{name: len(re.findall(pattern, text)) for name, pattern in CALLS.items()},
        "compiled in, s": seconds,
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*", type=Path, default=RECIPES)
    options = parser.parse_args()
    rows = [measure(recipe) for recipe in options.recipe]
    print_table(rows)
    if options.recipe == RECIPES:
        print(write_results("recipe_memory", rows, compiled_for="NVIDIA H200", jax=jax.__version__))


if __name__ == "__main__":
    main()
