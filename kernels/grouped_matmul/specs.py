"""Shapes of the grouped matmuls that models run, and ways to fill their groups, for tests and benchmarks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupedMatmulShape:
    """One call: x (rows, d_in), weights (groups, d_out, d_in)."""

    name: str
    rows: int
    groups: int
    d_in: int
    d_out: int

    @property
    def flops(self) -> int:
        """Of the forward pass when every row has a group; each of the two gradients costs the same again."""
        return 2 * self.rows * self.d_in * self.d_out


@dataclass(frozen=True)
class ExpertShape:
    """The gated experts of one model: width, hidden size of an expert, experts, experts per token."""

    name: str
    d_model: int
    d_hidden: int
    experts: int
    top_k: int

    def gate_up(self, tokens: int) -> GroupedMatmulShape:
        rows = tokens * self.top_k
        return GroupedMatmulShape(f"{self.name} gate_up", rows, self.experts, self.d_model, 2 * self.d_hidden)

    def down(self, tokens: int) -> GroupedMatmulShape:
        rows = tokens * self.top_k
        return GroupedMatmulShape(f"{self.name} down", rows, self.experts, self.d_hidden, self.d_model)


# From the config.json of each model.
MODELS = (
    ExpertShape("Mixtral-8x7B", d_model=4096, d_hidden=14336, experts=8, top_k=2),
    ExpertShape("Qwen3-30B-A3B", d_model=2048, d_hidden=768, experts=128, top_k=8),
    ExpertShape("OLMoE-1B-7B", d_model=2048, d_hidden=1024, experts=64, top_k=8),
    ExpertShape("DeepSeek-V3", d_model=7168, d_hidden=2048, experts=256, top_k=8),
    ExpertShape("gpt-oss-20b", d_model=2880, d_hidden=2880, experts=32, top_k=4),
    ExpertShape("Gemma-4-26B-A4B", d_model=2816, d_hidden=704, experts=128, top_k=8),
)

# Sized so that a CPU takes milliseconds; the first four differ in what they are bound by.
CPU_SHAPES = (
    GroupedMatmulShape("square", rows=8192, groups=16, d_in=512, d_out=512),
    GroupedMatmulShape("many groups", rows=16384, groups=64, d_in=256, d_out=512),
    GroupedMatmulShape("wide", rows=4096, groups=8, d_in=1024, d_out=2048),
    GroupedMatmulShape("small", rows=2048, groups=16, d_in=256, d_out=256),
    GroupedMatmulShape("few rows", rows=512, groups=128, d_in=256, d_out=128),
)

ROUTINGS = ("balanced", "zipf", "half_empty")


def make_group_sizes(routing: str, rows: int, groups: int, seed: int = 0) -> np.ndarray:
    """(groups,) int32 that sum to `rows`, drawn from a multinomial distribution.

    Args:
        routing: "balanced": all groups are equally likely; "zipf": the likelihoods are 1, 1/2, 1/3, ..., in
            random order; "half_empty": every other group is empty, the rest equally likely.
        rows: total number of rows.
        groups: number of groups.
        seed: of the random generator.
    """
    generator = np.random.default_rng(seed)
    if routing == "balanced":
        likelihood = np.ones(groups)
    elif routing == "zipf":
        likelihood = generator.permutation(1 / np.arange(1, groups + 1))
    elif routing == "half_empty":
        likelihood = (np.arange(groups) % 2 == 0).astype(float)
    else:
        raise ValueError(f"routing is {routing!r}; expected one of {', '.join(ROUTINGS)}")
    return generator.multinomial(rows, likelihood / likelihood.sum()).astype(np.int32)
