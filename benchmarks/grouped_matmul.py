"""Grouped matmul against one dense matmul of the same FLOPs (the limit) and jax.lax.ragged_dot (the peer).

    python benchmarks/grouped_matmul.py [--quick] [--dtype bfloat16] [--tokens 8192] [--no-peer]

All candidates of a line run alternately in this process and the best time of each counts, so that a neighbour
on the machine slows all of them or none. On an accelerator the shapes are those of real models.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from common import print_table, write_results

from jaxmoe.kernels.grouped_matmul import matmul, weight_gradient
from jaxmoe.kernels.grouped_matmul.specs import (
    CPU_SHAPES,
    MODELS,
    ROUTINGS,
    GroupedMatmulShape,
    make_group_sizes,
)

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return matmul(x, weights, group_sizes, transpose=False)


def ours_with_gradients(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, ...]:
    dx = matmul(dy, weights, group_sizes, transpose=True)
    return ours(x, weights, group_sizes), dx, weight_gradient(x, dy, group_sizes)


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
    """Best time in ms of each call. After a warm-up they alternate, each for about `seconds` or for one run.

    Where even the warm-up takes several seconds it is the one run: compiling is a small part of it.
    """
    best = {}
    for name, call in calls.items():
        warm_up = _time(call)
        best[name] = warm_up if warm_up > 5 else _time(call)
    repeats = {name: min(int(seconds / best[name]), 200) for name in calls}
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
) -> list[dict[str, Any]]:
    """One row for the forward pass and one for forward and backward."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.rows, shape.d_in), dtype)
    weights = jax.random.normal(keys[1], (shape.groups, shape.d_out, shape.d_in), dtype)
    dy = jax.random.normal(keys[2], (shape.rows, shape.d_out), dtype)
    sizes = jnp.asarray(make_group_sizes(routing, shape.rows, shape.groups))

    products: dict[str, Product] = {"ours": ours, "dense": dense}
    if with_peer:
        products["ragged_dot"] = ragged_dot
    rows = []
    for passes, matmuls in (("fwd", 1), ("fwd+bwd", 3)):
        calls: dict[str, Callable[[], Any]] = {}
        for name, product in products.items():
            weight = weights[0] if name == "dense" else weights
            if passes == "fwd":
                calls[name] = partial(jax.jit(product), x, weight, sizes)
            else:
                both = ours_with_gradients if name == "ours" else with_gradients(product)
                calls[name] = partial(jax.jit(both), x, weight, sizes, dy)
        times = best_times(calls, seconds)
        peer = times.get("ragged_dot")
        rows.append(
            {
                "shape": shape.name,
                "R,E,D,F": f"{shape.rows},{shape.groups},{shape.d_in},{shape.d_out}",
                "routing": routing,
                "pass": passes,
                "ms": times["ours"],
                "GFLOP/s": matmuls * shape.flops / times["ours"] / 1e6,
                "dense ms": times["dense"],
                "x dense": times["ours"] / times["dense"],
                "ragged_dot ms": peer,
                "speed-up": peer / times["ours"] if peer else None,
            }
        )
    return rows


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
            rows += measure(shape, routing, dtype, seconds, not arguments.no_peer)
            print(f"{shape.name}, {routing}: done", flush=True)
    print_table(rows)
    name = "grouped_matmul" + ("_quick" if arguments.quick else "")
    if arguments.dtype:
        name += f"_{dtype}"
    print(write_results(name, rows, dtype=dtype, statistic="best time"))


if __name__ == "__main__":
    main()
