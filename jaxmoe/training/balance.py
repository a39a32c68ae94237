"""Terms that keep experts evenly loaded and router logits small, from the router's statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.model.feed_forward.router import RouterStats


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """E · Σ_e f_e · P_e per layer, averaged over layers; 1 when balanced, E when one expert takes all.

    f_e is expert e's share of all choices and P_e its mean probability (Switch Transformer, arXiv 2101.03961,
    eq. 4-6, with f normalised by K). Taken per layer, since pooling lets imbalances of layers cancel.

    Args:
        stats: with a leading axis over layers.
    """
    share_LE = stats.load / jnp.maximum(stats.load.sum(-1, keepdims=True), 1.0)
    mean_LE = stats.probability / jnp.maximum(stats.tokens, 1.0)[:, None]
    return jnp.mean(stats.load.shape[-1] * jnp.sum(share_LE * mean_LE, axis=-1))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean of logsumexp(logits)² over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.mean(stats.z / jnp.maximum(stats.tokens, 1.0))


def router_metrics(stats: RouterStats) -> dict[str, list[float]]:
    """Per-layer figures for the log, from statistics with a leading axis over MoE layers.

    ``router/max_violation`` is the largest load over the mean, minus 1 (MaxVio, arXiv 2408.15664);
    ``router/entropy`` the entropy of the load over that of a uniform one; ``router/dead`` the share of experts
    that no token chose.
    """
    load: Any = np.asarray(stats.load, np.float64)
    share = load / np.maximum(load.sum(-1, keepdims=True), 1.0)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(-1) / max(np.log(load.shape[-1]), 1e-30)
    return {
        "router/max_violation": (share.max(-1) * load.shape[-1] - 1).tolist(),
        "router/entropy": entropy.tolist(),
        "router/dead": (load == 0).mean(-1).tolist(),
    }
