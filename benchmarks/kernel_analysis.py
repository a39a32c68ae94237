"""What each kernel of the expert layer has to do on a Hopper GPU, and the time that this takes at the least. No GPU.

    python benchmarks/kernel_analysis.py [--tokens 8192]

Counted from the tiles that the heuristic chooses, for a balanced routing drawn at random: FLOPs, those of padding
included; bytes that must cross the memory bus, each operand once; bytes that tiles load through the cache; shared
memory and accumulators, which leave room for one block of two consumers on a multiprocessor; and how full the last
round of tiles is. The least time is the larger of the computing time and the memory time at the ceilings that were
measured on an H200 by others (790 TFLOP/s bf16, 4.3 TB/s): a limit, no forecast.

Columns: tile as rows x columns x stages; KB of shared memory; acc, registers of accumulators in each thread of a
consumer; GFLOP that are useful; padding, FLOPs that come on top of those; MB over the memory bus; FLOP/B, per byte
loaded through the cache; rounds of tiles on all multiprocessors, and how full they are.
"""

import argparse
import math
from typing import Any

import numpy as np
from common import print_table, write_results

from jaxmoe.kernels.expert_mlp.mosaic.tiles import GradientLaunch, MatmulLaunch, slot_rows
from jaxmoe.kernels.expert_mlp.specs import LAYERS, ExpertLayer, choose_experts

TFLOPS, TERABYTES = 790.0, 4.3
MULTIPROCESSORS = 132
ELEMENT = 2
STORES = 64 * 64 * ELEMENT * 2


def analyse(layer: ExpertLayer, tokens: int) -> list[dict[str, Any]]:
    """One row for each kernel of forward and backward."""
    shape, parts = layer.shape, layer.activation.parts
    width, hidden, experts = shape.d_model, shape.d_hidden, shape.experts
    sizes = np.bincount(
        choose_experts("balanced", tokens, experts, shape.top_k).reshape(-1), minlength=experts
    )
    slots = int(sizes.sum())
    aligned = width % 128 == 0 and hidden % 128 == 0
    rows = slot_rows(slots, experts) if aligned else 128
    row_tiles = int(np.ceil(sizes / rows).sum())

    def matmul(name: str, launch: MatmulLaunch, read: int, written: int) -> dict[str, Any]:
        tiles = launch.tiles({})
        across = launch.columns // tiles.columns
        columns = launch.parts * tiles.columns
        kept = launch.kept_parts * tiles.columns * 256
        return _row(
            name,
            tiles=f"{rows}x{columns}x{tiles.stages}",
            shared=tiles.stages * 128 * (rows + columns) + 2 * STORES + kept,
            accumulators=columns * rows // 256,
            useful=2 * slots * launch.contraction * launch.parts * launch.columns,
            padded=2 * row_tiles * rows * launch.contraction * launch.parts * launch.columns,
            memory=read + written + ELEMENT * experts * launch.contraction * launch.parts * launch.columns,
            through_cache=ELEMENT * row_tiles * across * (rows + columns) * launch.contraction,
            tiles_in_all=row_tiles * across,
        )

    def gradient(name: str, out: int, columns: int, read: int) -> dict[str, Any]:
        tiles = GradientLaunch(out, columns).tiles({})
        count = experts * (out // tiles.out) * (columns // tiles.columns)
        return _row(
            name,
            tiles=f"{tiles.out}x{tiles.columns}x{tiles.stages}",
            shared=tiles.stages * 128 * (tiles.out + tiles.columns) + tiles.out // 64 * STORES,
            accumulators=tiles.columns // 2,
            useful=2 * slots * out * columns,
            padded=2 * row_tiles * rows * out * columns,
            memory=read + ELEMENT * experts * out * columns,
            through_cache=ELEMENT * row_tiles * rows * count // experts * (tiles.out + tiles.columns),
            tiles_in_all=count,
        )

    token_rows, slot_hidden, slot_width = (
        ELEMENT * n for n in (tokens * width, slots * hidden, slots * width)
    )
    pre = parts * slot_hidden
    table = [
        matmul("up", MatmulLaunch(rows, hidden, width, parts), token_rows, slot_hidden + pre),
        matmul("down", MatmulLaunch(rows, width, hidden), slot_hidden, slot_width),
        matmul(
            "dact", MatmulLaunch(rows, hidden, width, 1, True, parts), token_rows + pre, pre + slot_hidden
        ),
        matmul("dx", MatmulLaunch(rows, width, parts * hidden, 1, True), pre, slot_width),
        gradient("dgate_up", parts * hidden, width, pre + token_rows),
        gradient("ddown", width, hidden, slot_hidden + token_rows),
    ]
    for name, weights in (("sum of choices", 2), ("sum of dx", 2)):
        table.append(_row(name, memory=slot_width + token_rows, useful=weights * slots * width))
    return [{"model": layer.name, "tokens": tokens, **row} for row in table]


def _row(
    name: str,
    *,
    useful: int,
    memory: int,
    padded: int | None = None,
    through_cache: int | None = None,
    tiles: str = "XLA",
    shared: int | None = None,
    accumulators: int | None = None,
    tiles_in_all: int | None = None,
) -> dict[str, Any]:
    compute_ms = None if padded is None else padded / TFLOPS / 1e9
    memory_ms = memory / TERABYTES / 1e9
    rounds = None if tiles_in_all is None else tiles_in_all / MULTIPROCESSORS
    return {
        "kernel": name,
        "tile": tiles,
        "KB": None if shared is None else shared / 1024,
        "acc": accumulators,
        "GFLOP": useful / 1e9,
        "padding": None if padded is None else padded / useful - 1,
        "MB": memory / 1e6,
        "FLOP/B": None if through_cache is None or padded is None else padded / through_cache,
        "rounds": rounds,
        "last": None if rounds is None else rounds / math.ceil(rounds),
        "compute ms": compute_ms,
        "memory ms": memory_ms,
        "least ms": max(memory_ms, compute_ms or 0.0),
    }


def main() -> None:
    """The tables, and for each model the least time of a whole layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768])
    tokens = parser.parse_args().tokens
    rows = [row for layer in LAYERS for count in tokens for row in analyse(layer, count)]
    totals = []
    for layer in LAYERS:
        for count in tokens:
            least = {
                row["kernel"]: row["least ms"]
                for row in rows
                if (row["model"], row["tokens"]) == (layer.name, count)
            }
            forward = least["up"] + least["down"] + least["sum of choices"]
            shape = layer.shape
            flops = (1 + layer.activation.parts) * 2 * count * shape.top_k * shape.d_model * shape.d_hidden
            lora = forward + least["dact"] + least["dx"] + least["sum of dx"]
            totals.append(
                {
                    "model": layer.name,
                    "tokens": count,
                    "forward ms": forward,
                    "forward TFLOP/s": flops / forward / 1e9,
                    "step ms": sum(least.values()),
                    "step TFLOP/s": 3 * flops / sum(least.values()) / 1e9,
                    "frozen base, of step": lora / sum(least.values()),
                }
            )
    print_table(rows)
    print_table(totals)
    print(
        write_results("kernel_analysis", rows, totals=totals, tflops=TFLOPS, terabytes_per_second=TERABYTES)
    )


if __name__ == "__main__":
    main()
