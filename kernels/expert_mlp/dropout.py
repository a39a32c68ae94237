"""Dropout of what enters the experts' low-rank updates: every slot, that is (token, choice) pair, has masks of its own.

A mask follows from a key and the number of its slot alone, so that the backward pass makes it again, and a token's
masks differ from one of its experts to the next.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("up", "down"), meta_fields=("rate",))
@dataclasses.dataclass(frozen=True)
class SlotDropout:
    """Inverted dropout (Srivastava et al., JMLR 15, 2014) of the inputs of A.

    Attributes:
        up: data of a PRNG key, uint32: of the update of gate_up.
        down: the same, of the update of down.
        rate: share of the numbers that become zero, from 0 to below 1.
    """

    up: jax.Array
    down: jax.Array
    rate: float


def factors(key: jax.Array, slots_b: jax.Array, width: int, rate: float) -> jax.Array:
    """What the inputs of some slots are multiplied with: 0 or 1 / (1 - rate).

    Args:
        key: data of a PRNG key, uint32.
        slots_b: (b,) int32, numbers of slots, token * K + choice.
        width: of an input.
        rate: share of zeros.

    Returns:
        (b, width) float32.
    """

    def one(slot: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.wrap_key_data(key), slot)
        return jax.random.uniform(own, (width,), jnp.float32) >= rate

    return jnp.where(jax.vmap(one)(slots_b), 1 / (1 - rate), 0.0).astype(jnp.float32)
