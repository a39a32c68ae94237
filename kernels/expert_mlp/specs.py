"""Expert layers of real models, and ways to choose experts, for tests, tuning and benchmarks."""

import dataclasses

import numpy as np

from jaxmoe.kernels.expert_mlp.activations import Activation
from jaxmoe.kernels.grouped_matmul.specs import MODELS, ExpertShape


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

LAYERS = tuple(ExpertLayer(shape, *_OTHERS.get(shape.name, (Activation(), False))) for shape in MODELS)


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
