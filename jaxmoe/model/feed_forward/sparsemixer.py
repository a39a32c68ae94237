"""SparseMixer-2's choice of experts (Liu et al., arXiv 2409.12136), without its sampling."""

import jax
import jax.numpy as jnp


def sparsemixer(logits_RE: jax.Array, top_k: int, threshold: float) -> tuple[jax.Array, jax.Array]:
    """K rounds; each takes the expert of the highest logit and weighs it by a softmax, then leaves it out.

    The softmax of a round is over the experts whose logit l is near the highest h: (h − l) / max(|l|, h) at most
    2·threshold. In training the paper draws the expert from that softmax instead; this is the choice of evaluation.

    Args:
        logits_RE: (R, E).
        top_k: K.
        threshold: relative distance, half of what is allowed.

    Returns:
        Experts (R, K) int32 and weights (R, K) in the dtype of the logits.
    """
    left = logits_RE
    experts, weights = [], []
    for _ in range(top_k):
        chosen = jnp.argmax(left, axis=-1, keepdims=True)
        highest = jnp.take_along_axis(left, chosen, axis=-1)
        far = (highest - logits_RE) / jnp.maximum(jnp.abs(logits_RE), highest) > 2 * threshold
        shares = jax.nn.softmax(jnp.where(jax.lax.stop_gradient(far), -jnp.inf, left), axis=-1)
        experts.append(chosen)
        weights.append(jnp.take_along_axis(shares, chosen, axis=-1))
        left = jnp.where(jnp.arange(left.shape[-1])[None] == chosen, -jnp.inf, left)
    return jnp.concatenate(experts, axis=-1).astype(jnp.int32), jnp.concatenate(weights, axis=-1)
