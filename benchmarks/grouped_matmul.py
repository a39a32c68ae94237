"""Grouped matmul against one dense matmul of the same FLOPs (the limit) and jax.lax.ragged_dot (the peer).

    python benchmarks/grouped_matmul.py [--quick] [--dtype bfloat16] [--tokens 8192]

All candidates of a line run alternately in this process and the best time of each counts, so that a neighbour
on the machine slows all of them or none. On an accelerator the shapes are those of real models.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import print_table, write_results

from jaxmoe.kernels.grouped_matmul import grouped_matmul
from jaxmoe.kernels.grouped_matmul.specs import (
    CPU_SHAPES,
    MODELS,
    ROUTINGS,
    GroupedMatmulShape,
    make_group_sizes,
)

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return grouped_matmul(x, weights, group_sizes)


def ragged_dot(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = jax.lax.ragged_dot(x, weights.swapaxes(1, 2), group_sizes, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def dense(x: jax.Array, weights: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.einsum("rd,fd->rf", x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def with_gradients(product: Product) -> Callable[..., tuple[jax.Array, ...]]:
    def forward_backward(
        x: jax.Array, weights: jax.Array, group_sizes: jax.Array, dy: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(lambda x, weights: product(x, weights, group_sizes), x, weights)
        return out, *pull_back(dy)

    return forward_backward


def best_times(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Best time in ms of each call; they alternate, each for about `seconds`, and at least twice."""
    cost = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        cost[name] = _time(call)
    best = dict(cost)
    repeats = {name: int(np.clip(seconds / cost[name], 1, 50)) for name in calls}
    for index in range(max(repeats.values())):
        for name, call in calls.items():
            if index < repeats[name]:
                best[name] = min(best[name], _time(call))
    return {name: 1e3 * value for name, value in best.items()}


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(
    shape: GroupedMatmulShape, routing: str, dtype: str, seconds: float, with_peer: bool
) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.rows, shape.d_in), dtype)
    weights = jax.random.normal(keys[1], (shape.groups, shape.d_out, shape.d_in), dtype)
    dy = jax.random.normal(keys[2], (shape.rows, shape.d_out), dtype)
    sizes = jnp.asarray(make_group_sizes(routing, shape.rows, shape.groups))

    products: dict[str, Product] = {"ours": ours, "dense": dense}
    if with_peer:
        products["ragged_dot"] = ragged_dot
    row: dict[str, Any] = {
        "shape": shape.name,
        "R,E,D,F": f"{shape.rows},{shape.groups},{shape.d_in},{shape.d_out}",
        "routing": routing,
    }
    for stage, products_of_stage in (("fwd", 1), ("fwd+bwd", 3)):
        calls: dict[str, Callable[[], Any]] = {}
        for name, product in products.items():
            weight = weights[0] if name == "dense" else weights
            if stage == "fwd":
                calls[name] = jax.tree_util.Partial(jax.jit(product), x, weight, sizes)
            else:
                calls[name] = jax.tree_util.Partial(jax.jit(with_gradients(product)), x, weight, sizes, dy)
        times = best_times(calls, seconds)
        row[f"{stage} ms"] = times["ours"]
        row[f"{stage} GFLOP/s"] = products_of_stage * shape.flops / times["ours"] / 1e6
        row[f"{stage} dense ms"] = times["dense"]
        row[f"{stage} / dense"] = times["ours"] / times["dense"]
        row[f"{stage} ragged_dot ms"] = times.get("ragged_dot")
        row[f"{stage} speed-up over ragged_dot"] = times["ragged_dot"] / times["ours"] if with_peer else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer lines and repeats: about a minute on a CPU"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens for the shapes of real models")
    parser.add_argument("--no-peer", action="store_true", help="leave ragged_dot out")
    arguments = parser.parse_args()

    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    model_shapes = [
        shape for model in MODELS for shape in (model.gate_up(arguments.tokens), model.down(arguments.tokens))
    ]
    shapes = list(CPU_SHAPES) if on_cpu else model_shapes
    routings: tuple[str, ...] = ROUTINGS
    seconds = 1.0
    if arguments.quick:
        shapes, routings, seconds = (
            sorted(shapes, key=lambda shape: shape.flops)[:3],
            ("balanced", "zipf"),
            0.3,
        )

    rows = []
    for shape in shapes:
        for routing in routings:
            rows.append(measure(shape, routing, dtype, seconds, not arguments.no_peer))
            print(f"{shape.name}, {routing}: done", flush=True)
    short = {"GFLOP/s": "GF/s", "speed-up over ragged_dot": "vs ragged", "ragged_dot ms": "ragged ms"}
    print_table([{_shorten(key, short): value for key, value in row.items()} for row in rows])
    name = "grouped_matmul" if dtype == ("float32" if on_cpu else "bfloat16") else f"grouped_matmul_{dtype}"
    print(
        write_results(name + ("_quick" if arguments.quick else ""), rows, dtype=dtype, statistic="best time")
    )


def _shorten(key: str, short: dict[str, str]) -> str:
    for long, abbreviation in short.items():
        key = key.replace(long, abbreviation)
    return key


if __name__ == "__main__":
    main()
