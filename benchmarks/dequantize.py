"""Dequantising nf4 on one CPU core: `jaxmoe.codecs` beside other lookups, and beside bitsandbytes' order of the bytes.

    taskset -c 0 python benchmarks/dequantize.py [--quick]

One matrix of an expert of Qwen3-30B-A3B. The ways of one dtype run alternately in this process and the best time of
each counts. GB/s are of the result.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import print_table, variables, write_results

from jaxmoe.codecs.four_bit import FourBit, dequantize, quantize
from jaxmoe.codecs.tables import VALUES, values_of

BOOK = VALUES["nf4"]
PAIRS = np.stack([BOOK[np.arange(256) >> 4], BOOK[np.arange(256) & 15]], -1)


def gather(codes: jax.Array) -> jax.Array:
    return jnp.asarray(BOOK)[codes]


def tree(codes: jax.Array) -> jax.Array:
    return values_of(codes, "nf4")


def our_order(lookup: Callable[[jax.Array], jax.Array], packed: FourBit, dtype: Any) -> jax.Array:
    """Halves of blocks, rounded by XLA."""
    halves = [lookup(half) * packed.absmax[..., None] for half in (packed.codes >> 4, packed.codes & 15)]
    return jnp.concatenate(halves, -1).astype(dtype).reshape(packed.shape)


def their_order(lookup: Callable[[jax.Array], jax.Array], packed: FourBit, dtype: Any) -> jax.Array:
    """Neighbours, rounded by XLA; the bytes are taken for those of bitsandbytes, which are as many."""
    halves = [lookup(half) * packed.absmax[..., None] for half in (packed.codes >> 4, packed.codes & 15)]
    return jnp.stack(halves, -1).astype(dtype).reshape(packed.shape)


def pairs(packed: FourBit, dtype: Any) -> jax.Array:
    """Two neighbours from a table of 256."""
    values = jnp.asarray(PAIRS)[packed.codes] * packed.absmax[..., None, None]
    return values.astype(dtype).reshape(packed.shape)


WAYS: dict[str, Callable[[FourBit, Any], jax.Array]] = {
    "jaxmoe.codecs": dequantize,
    "halves of blocks, tree of selects": partial(our_order, tree),
    "halves of blocks, gather": partial(our_order, gather),
    "neighbours, tree of selects": partial(their_order, tree),
    "neighbours, gather": partial(their_order, gather),
    "neighbours, pairs of 256": pairs,
}


def best_seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    best = {name: float("inf") for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small matrix, which says little; writes nothing"
    )
    options = parser.parse_args()
    shape = (24, 256) if options.quick else (768, 2048)
    repeats = 2 if options.quick else 40
    values = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    packed = jax.jit(quantize)(values)
    rows = []
    for dtype in ("bfloat16", "float32", "float16"):
        calls = {
            name: partial(jax.jit(partial(way, dtype=jnp.dtype(dtype))), packed) for name, way in WAYS.items()
        }
        for name, seconds in best_seconds(calls, repeats).items():
            rate = values.size * jnp.dtype(dtype).itemsize / seconds / 1e9
            rows.append({"dtype": dtype, "way": name, "us": 1e6 * seconds, "GB/s": rate})
    print_table(rows)
    if not options.quick:
        print(write_results("dequantize", rows, variables=variables(), shape=list(shape)))


if __name__ == "__main__":
    main()
