"""The next token: a weighted mean of negative log-likelihoods."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.model.batch import Batch
from jaxmoe.model.head import Head
from jaxmoe.training.cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Σ weight · -log p(target) / Σ weight, in nats."""

    def size(self, batch: Batch) -> jax.Array:
        """The sum of all weights."""
        return jnp.sum(batch.weights)

    def loss(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The weighted sum over a micro-batch; no further sums."""
        return linear_cross_entropy(hidden_BTD, head, batch.targets, batch.weights), {}
