"""Expert layers of real models, and ways to choose experts, for tests, tuning and benchmarks."""

import dataclasses
import json
from collections.abc import Iterator
from importlib import resources

import numpy as np

from jaxmoe.kernels.expert_mlp.activations import Activation


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """The gated experts of one model: width, hidden size of an expert, experts, experts per token."""

    name: str
    d_model: int
    d_hidden: int
    experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """The experts of one model.

    Attributes:
        shape: sizes.
        activation: between the two matrices.
        bias: whether both matrices have one.
    """

    shape: ExpertShape
    activation: Activation = Activation()
    bias: bool = False

    @property
    def name(self) -> str:
        return self.shape.name


_OTHERS = {
    "gpt-oss-20b": (Activation("swiglu_clamped"), True),
    "Gemma-4-26B-A4B": (Activation("gelu_tanh"), False),
}

_NAMES = ("Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V3", "gpt-oss-20b", "Gemma-4-26B-A4B")


def _published() -> Iterator[ExpertShape]:
    """The experts of published models.

    Families spell three of the sizes in several ways; the first field that a config has is taken.
    """
    text = resources.files("jaxmoe.configs").joinpath("published.json").read_text(encoding="utf-8")
    models = json.loads(text)
    for name in _NAMES:
        config = models[name]["config"]
        first = lambda *fields, config=config: next(config[field] for field in fields if field in config)
        yield ExpertShape(
            name,
            d_model=config["hidden_size"],
            d_hidden=first("moe_intermediate_size", "intermediate_size"),
            experts=first("num_experts", "num_local_experts", "n_routed_experts"),
            top_k=first("num_experts_per_tok", "top_k_experts"),
        )


LAYERS = tuple(ExpertLayer(shape, *_OTHERS.get(shape.name, (Activation(), False))) for shape in _published())


def layer_of(name: str) -> ExpertLayer:
    """The layer of the model of that name."""
    return next(layer for layer in LAYERS if layer.name == name)


def choose_experts(routing: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """(tokens, top_k) int32, different experts for each token.

    Args:
        routing: "balanced": all experts are equally likely; "zipf": their likelihoods are 1, 1/2, 1/3, ..., in random
            order (a token's choices differ, so that the first ones are chosen by fewer than that); "half_empty":
            every other expert is never chosen, the rest are equally likely.
        tokens: number of tokens.
        experts: number of experts.
        top_k: choices of a token.
        seed: of the random generator.
    """
    generator = np.random.default_rng(seed)
    likelihood = np.ones(experts)
    if routing == "zipf":
        likelihood = generator.permutation(1 / np.arange(1, experts + 1))
    elif routing == "half_empty":
        likelihood = (np.arange(experts) % 2 == 0).astype(float)
        top_k_most = int(likelihood.sum())
        if top_k > top_k_most:
            raise ValueError(f"top_k is {top_k}; expected at most {top_k_most}, half of {experts} experts")
    elif routing != "balanced":
        raise ValueError(f"routing is {routing!r}; expected balanced, zipf or half_empty")
    # The largest of log(likelihood) + Gumbel noise are a draw without replacement (Gumbel-top-k).
    with np.errstate(divide="ignore"):
        keys = np.log(likelihood) + generator.gumbel(size=(tokens, experts))
    return np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k].astype(np.int32)
