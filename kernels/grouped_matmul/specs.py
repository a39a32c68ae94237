"""Shapes of the grouped matmuls that models run, and ways to fill their groups, for tests and benchmarks."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources

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


_NAMES = ("Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V3", "gpt-oss-20b", "Gemma-4-26B-A4B")


def _published(names: Iterable[str]) -> Iterator[ExpertShape]:
    """The experts of published models.

    Families spell three of the sizes in several ways; the first field that a config has is taken.
    """
    text = resources.files("jaxmoe.configs").joinpath("published.json").read_text(encoding="utf-8")
    models = json.loads(text)
    for name in names:
        config = models[name]["config"]
        first = lambda *fields, config=config: next(config[field] for field in fields if field in config)
        yield ExpertShape(
            name,
            d_model=config["hidden_size"],
            d_hidden=first("moe_intermediate_size", "intermediate_size"),
            experts=first("num_experts", "num_local_experts", "n_routed_experts"),
            top_k=first("num_experts_per_tok", "top_k_experts"),
        )


MODELS = tuple(_published(_NAMES))

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
