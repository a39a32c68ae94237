"""What an expert layer must compute and move, and what its benchmark aims at."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.kernels.expert_mlp.specs import ExpertLayer

RANK = 16
"""Of LoRA."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer to measure: R tokens, K experts for each, width D, hidden width F."""

    layer: ExpertLayer
    tokens: int
    routing: str

    @property
    def slots(self) -> int:
        """Z = R K."""
        return self.tokens * self.layer.shape.top_k

    def flops(self, weights: str, backward: bool) -> int:
        """Useful operations; of the backward pass what a weight that is not trained needs no gradient for is left out.

        Full: 6 R K D F forward, 18 with the backward pass. LoRA with a frozen base: 6 and 12, and those of the low
        ranks, 2 R K r (3 D + 3 F), three times with the backward pass.
        """
        shape = self.layer.shape
        matmuls = 6 * self.slots * shape.d_model * shape.d_hidden
        if weights == "full":
            return 3 * matmuls if backward else matmuls
        low = 2 * self.slots * RANK * 3 * (shape.d_model + shape.d_hidden)
        return 2 * matmuls + 3 * low if backward else matmuls + low

    def bytes(self, weights: str, backward: bool, size: int = 2) -> int:
        """Least that goes through memory in passes as fused as they can be; LoRA's own small arrays are left out.

        Forward: the weights, x and out once; per slot the pre-activation (kept), the activation and the output of the
        second matrix, the latter two written and read. Backward: the weights again, and their gradients if they are
        trained; per slot the rows of x once and those of the output's gradient twice; the pre-activation once, its
        gradient three times, the weighted activation and the gradient of the rows twice each; x's gradient.
        """
        shape = self.layer.shape
        matrices = 3 * shape.experts * shape.d_model * shape.d_hidden
        rows, wide, hidden = (
            self.tokens * shape.d_model,
            self.slots * shape.d_model,
            self.slots * shape.d_hidden,
        )
        total = matrices + 2 * rows + (2 + 2) * hidden + 2 * wide
        if backward:
            total += matrices * (2 if weights == "full" else 1)
            total += 3 * wide + (2 + 3 * 2 + 2) * hidden + 2 * wide + rows
        return size * total

    def floor_ms(self, weights: str, backward: bool, ceilings: Mapping[str, float], size: int = 2) -> float:
        """The larger of compute and memory time at the measured ceilings."""
        compute = self.flops(weights, backward) / ceilings["matmul TFLOP/s"] / 1e9
        memory = self.bytes(weights, backward, size) / ceilings["copy GB/s"] / 1e6
        return max(compute, memory)


@dataclasses.dataclass(frozen=True)
class Target:
    """An aim: the value of some rows, None if they were not measured."""

    text: str
    value: Callable[[Sequence[Mapping[str, Any]]], float | None]
    aim: float
    at_least: bool = True


def targets_table(targets: Sequence[Target], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each target: reached, missed or not measured."""
    table = []
    for target in targets:
        value = target.value(rows)
        reached = value is not None and (value >= target.aim if target.at_least else value <= target.aim)
        table.append(
            {
                "target": target.text,
                "aim": f"{'≥' if target.at_least else '≤'} {target.aim:g}",
                "measured": value,
                "": "not measured" if value is None else "reached" if reached else "missed",
            }
        )
    return table


def _of(
    model: str, tokens: int, field: str, passes: str
) -> Callable[[Sequence[Mapping[str, Any]]], float | None]:
    def value(rows: Sequence[Mapping[str, Any]]) -> float | None:
        for row in rows:
            place = (row["model"], row["tokens"], row["routing"], row["weights"], row["pass"])
            if place == (model, tokens, "balanced", "full", passes):
                return row.get(field)
        return None

    return value


def _worst(field: str, weights: str, largest: bool) -> Callable[[Sequence[Mapping[str, Any]]], float | None]:
    def value(rows: Sequence[Mapping[str, Any]]) -> float | None:
        values = [row[field] for row in rows if row["weights"] == weights and row.get(field) is not None]
        return (max if largest else min)(values) if values else None

    return value


def _best_tokamax(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The smallest, over rows, of the fastest tokamax's time over ours."""
    ratios = []
    for row in rows:
        peers = [time for name, time in row["peers ms"].items() if name.startswith("tokamax")]
        if peers and row["ms"]:
            ratios.append(min(peers) / row["ms"])
    return min(ratios, default=None)


QWEN, MIXTRAL = "Qwen3-30B-A3B", "Mixtral-8x7B"

GPU_TARGETS = (
    Target("Qwen3-30B-A3B, 8192 tokens, forward, TFLOP/s", _of(QWEN, 8192, "TFLOP/s", "fwd"), 345),
    Target("Qwen3-30B-A3B, 32768 tokens, forward, TFLOP/s", _of(QWEN, 32768, "TFLOP/s", "fwd"), 500),
    Target(
        "Qwen3-30B-A3B, 8192 tokens, backward, TFLOP/s", _of(QWEN, 8192, "backward TFLOP/s", "fwd+bwd"), 194
    ),
    Target(
        "Qwen3-30B-A3B, 32768 tokens, forward+backward, TFLOP/s", _of(QWEN, 32768, "TFLOP/s", "fwd+bwd"), 413
    ),
    Target("Mixtral-8x7B, 8192 tokens, forward, TFLOP/s", _of(MIXTRAL, 8192, "TFLOP/s", "fwd"), 613),
    Target(
        "Mixtral-8x7B, 8192 tokens, backward, TFLOP/s", _of(MIXTRAL, 8192, "backward TFLOP/s", "fwd+bwd"), 452
    ),
    Target("times as fast as tokamax's best backend, in the worst row", _best_tokamax, 1.3),
    Target(
        "LoRA step over full step, in the worst line",
        _worst("over full", "lora", largest=True),
        0.75,
        at_least=False,
    ),
)

CPU_TARGETS = tuple(
    target
    for weights in ("full", "lora")
    for target in (
        Target(
            f"times as fast as jax.lax.ragged_dot, in the worst row ({weights})",
            _worst("x ragged_dot", weights, largest=False),
            10,
        ),
        Target(
            f"time over that of a dense layer, in the worst row ({weights})",
            _worst("over dense", weights, largest=True),
            2.5,
            at_least=False,
        ),
    )
)
