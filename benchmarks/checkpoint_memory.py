"""Peak host memory of loading and of exporting a checkpoint of at least 2 GB that is made up for it.

    python benchmarks/checkpoint_memory.py

The limit is what the devices hold plus 1.3 times the largest file of the checkpoint. On a CPU the devices'
memory is host memory too, so the peak counts both. Each measurement is a process of its own; what the process
holds before the checkpoint is opened (Python, jax, compiled code) is measured and counted apart.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 640,
    "num_experts": 56,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "dtype": "bfloat16",
}
MB = 1e6


def make_checkpoint(folder: Path, fused: bool, shard_bytes: int) -> None:
    """Random bfloat16 weights, drawn and written tensor by tensor."""
    import ml_dtypes
    import numpy as np

    from jaxmoe.interop.families import FAMILIES
    from jaxmoe.interop.rules import bind
    from jaxmoe.interop.storage.writer import FolderWriter, index_json, plan_shards

    family = FAMILIES["qwen3_moe"]
    spec = family.spec(CONFIG, "config")
    rules = family.rules(spec)
    if fused:  # the second layout of the experts
        fused_targets = {
            rule.target
            for rule in rules
            if "experts.gate_up_proj" in rule.source or "experts.down_proj" in rule.source
        }
        rules = tuple(rule for rule in rules if rule.target not in fused_targets or "{E}" not in rule.source)
    bindings = bind(rules, spec)
    shards = plan_shards([(b.source, "BF16", b.shape) for b in bindings.of_tensor.values()], shard_bytes)
    rng = np.random.default_rng(0)
    with FolderWriter(folder) as writer:
        for shard in shards:
            writer.shard(
                shard, lambda info: rng.standard_normal(info.shape, np.float32).astype(ml_dtypes.bfloat16)
            )
        writer.file("model.safetensors.index.json", index_json(shards))
        writer.file("config.json", json.dumps(CONFIG).encode())


def worker(what: str, folder: Path, out: Path) -> None:
    """One measured process: prints a JSON object."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.interop.loading import load_params, open_source
    from jaxmoe.interop.saving import export_like_source

    jnp.zeros(8).block_until_ready()
    source = open_source(folder)
    base = _resident()
    with _Peak() as peak:
        start = time.perf_counter()
        params = jax.block_until_ready(load_params(source, jnp.bfloat16))
        if what == "export":
            changed = jax.tree.map(lambda x: x, params)
            changed["norm"] = changed["norm"] + 1
            export_like_source(changed, source, out)
        seconds = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"base": base, "peak": peak.bytes, "held": held, "seconds": seconds}))


class _Peak:
    """The largest resident memory while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "_Peak":
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run(what: str, folder: Path, out: Path) -> dict[str, Any]:
    """`worker` in a process of its own."""
    command = [sys.executable, __file__, "--worker", what, str(folder), str(out)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(text.splitlines()[-1])


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--shard-mb", type=int, default=450)
    options = parser.parse_args()
    if options.worker:
        what, folder, out = options.worker
        worker(what, Path(folder), Path(out))
        return
    from common import print_table, write_results

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layout in ("one tensor per expert", "fused experts"):
            folder = Path(temporary) / "source"
            make_checkpoint(folder, layout == "fused experts", int(options.shard_mb * MB))
            sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
            for what in ("load", "export"):
                figures = run(what, folder, Path(temporary) / "out")
                extra = figures["peak"] - figures["base"] - figures["held"]
                rows.append(
                    {
                        "layout": layout,
                        "what": "load" if what == "load" else "load and export",
                        "checkpoint_mb": sum(sizes) / MB,
                        "largest_file_mb": max(sizes) / MB,
                        "devices_hold_mb": figures["held"] / MB,
                        "peak_mb": (figures["peak"] - figures["base"]) / MB,
                        "beyond_devices_mb": extra / MB,
                        "over_largest_file": extra / max(sizes),
                        "limit": 1.3,
                        "seconds": figures["seconds"],
                    }
                )
            shutil.rmtree(folder)
            shutil.rmtree(Path(temporary) / "out")
    print_table(rows)
    print(write_results("checkpoint_memory", rows, config=CONFIG))


if __name__ == "__main__":
    main()
