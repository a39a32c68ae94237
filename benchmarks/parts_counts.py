"""The parts of a training step on a CPU: what each has to compute and to move at least.

FLOPs are those of matrix products alone; what is done element by element is left out. Bytes are those of every operand
read once and every result written once, in float32, as if all between stayed in the cache. A floor is the larger of
both over the rates of a large matmul and of a large copy. Letters as in `jaxmoe.params`.
"""

import dataclasses

WHOLE = "whole step"
REST = "rest"

COUNTED = {
    "attention, forward": True,
    "attention, backward": True,
    "attention's projections": True,
    "norms and rotation": True,
    "router": True,
    "experts": True,
    "embedding": False,
    "head and cross-entropy": False,
    "clipping and AdamW": False,
}
"""Parts that together are the step but for the rest, and whether every layer has one."""

INSIDE = {
    "· forward": "experts",
    "· backward, dX": "experts",
    "· backward, dW": "experts",
    "· activation": "experts",
    "· dispatch": "experts",
    "· AdamW": "clipping and AdamW",
    "· clipping": "clipping and AdamW",
}
"""Parts of parts. Experts forward and backward are whole passes, products and what goes with them; of these, activation
and the order of dispatch are shown by themselves too."""

LEFT = {
    "· backward, dW": ("experts", ("· forward", "· backward, dX")),
    "· clipping": ("clipping and AdamW", ("· AdamW",)),
}
"""What is left of a part without others: code that fuses it has it nowhere."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step's sizes."""

    batch: int
    length: int
    width: int
    layers: int
    hidden: int
    experts: int
    top_k: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Least:
    """FLOPs and bytes that a part cannot do without."""

    flops: float
    bytes: float

    def ms(self, rates: dict[str, float]) -> dict[str, float]:
        """Floors by FLOPs and by bytes, given the rates of `common.ceilings`."""
        return {
            "flops": 1e3 * self.flops / (rates["matmul TFLOP/s"] * 1e12),
            "bytes": 1e3 * self.bytes / (rates["copy GB/s"] * 1e9),
        }


def least(shape: Shape) -> dict[str, Least]:
    """Of every part, once: of a layer's for one layer."""
    rows, width = shape.batch * shape.length, shape.width
    counts = _attention(shape, rows) | _experts(shape, rows * shape.top_k)
    # Forward and two backward products. Input twice read, its gradient written; logits and theirs.
    counts["router"] = _least(6 * rows * width * shape.experts, 3 * rows * width + 2 * rows * shape.experts)
    # Rows read and written; the gradient's rows read, all of the table's gradient written.
    counts["embedding"] = _least(0, 3 * rows * width + shape.vocabulary * width)
    # logits, dhidden, dW; the logits stay in the cache, chunk by chunk.
    counts["head and cross-entropy"] = _least(
        6 * rows * shape.vocabulary * width, 2 * rows * width + 2 * shape.vocabulary * width
    )
    # Reads gradient, weight and both moments, writes the latter three; a norm reads the gradient once before.
    counts["· AdamW"] = _least(0, 7 * shape.parameters)
    counts["· clipping"] = _least(0, shape.parameters)
    counts["clipping and AdamW"] = _least(0, 8 * shape.parameters)
    return counts


def whole_floor_ms(shape: Shape, rates: dict[str, float]) -> dict[str, float]:
    """Sums of the parts' floors over a step, by FLOPs, by bytes, and of the larger of both of each part."""
    totals = {"flops": 0.0, "bytes": 0.0, "both": 0.0}
    counts = least(shape)
    for part, in_layers in COUNTED.items():
        floors = counts[part].ms(rates)
        for key, value in (floors | {"both": max(floors.values())}).items():
            totals[key] += value * (shape.layers if in_layers else 1)
    return totals


def _least(flops: float, floats: float) -> Least:
    return Least(float(flops), 4.0 * floats)


def _attention(shape: Shape, rows: int) -> dict[str, Least]:
    """A query sees (T + 1) / 2 keys on average; scores and weighted sum take 2 N H FLOPs for each of them, the backward
    pass five products where the forward pass has two, as nobody keeps the scores."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    flops = 4 * rows * queries * (shape.length + 1) / 2
    both = queries + keys
    weights = 2 * shape.width * both
    return {
        # q, k, v → out
        "attention, forward": _least(flops, rows * 2 * both),
        # q, k, v, out, dout → dq, dk, dv
        "attention, backward": _least(2.5 * flops, rows * 4 * both),
        # Of q, k, v and o: 2 R D FLOPs per column, three times. x and out read twice, their gradients written; products
        # written, their gradients read; weights read twice, their gradients written.
        "attention's projections": _least(
            6 * rows * weights,
            rows * (3 * (shape.width + queries) + 2 * (2 * both + shape.width)) + 3 * weights,
        ),
        # Two norms of D, one of every query and key, and a rotation: x → y; x, dy → dx.
        "norms and rotation": _least(0, 5 * rows * (2 * shape.width + both)),
    }


def _experts(shape: Shape, slots: int) -> dict[str, Least]:
    """Of Z slots: gate and up are one matrix (2F, D), down is (D, F); 2 · 3 F D FLOPs for each slot and pass."""
    width, hidden = shape.width, shape.hidden
    flops, weights = 6 * slots * hidden * width, 3 * shape.experts * hidden * width
    rows = slots / shape.top_k
    moved = 2 * rows * width + 2 * slots * hidden + weights
    return {
        # x → out; gate and up kept
        "· forward": _least(flops, moved),
        # dout, gate and up → dx
        "· backward, dX": _least(flops, moved),
        # x, dout, gate and up → both gradients
        "· backward, dW": _least(flops, moved),
        # gate, up → activation; gate, up, dactivation → dgate, dup, activation
        "· activation": _least(0, 9 * slots * hidden),
        # choices → order and its inverse
        "· dispatch": _least(0, 3 * slots),
        # x, out, dout, dx; weights read twice, their gradients written; gate and up kept from one pass to the other
        "experts": _least(3 * flops, 4 * rows * width + 3 * weights + 4 * slots * hidden),
    }
