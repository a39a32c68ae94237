"""The term that trains indexers, from their statistics."""

import jax
import jax.numpy as jnp

from jaxmoe.model.mixers.selected_keys import IndexerStats


def indexer_loss(stats: IndexerStats) -> jax.Array:
    """How far attention's weights are from what indexers expect of them, in nats: the mean over tokens and indexers.

    It trains indexers alone, as these see activations without their gradient, and the other terms train everything
    else (DeepSeek-V3.2, arXiv 2512.02556, section 2.1.1).
    """
    return stats.divergence / jnp.maximum(stats.tokens, 1.0)
