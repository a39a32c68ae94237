"""Dropout of what enters a low-rank pair, in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("key",), meta_fields=("rate",))
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Inverted dropout (Srivastava et al., JMLR 15, 2014), the same at every call.

    Attributes:
        key: a PRNG key.
        rate: share of the numbers that become zero, from 0 to below 1; the others are divided by 1 - rate.
    """

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…), in its own dtype."""
        kept = jax.random.uniform(self.key, x.shape, jnp.float32) >= self.rate
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), 0)

    def fold(self, number: int) -> "Dropout":
        """Another one of the same rate."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))
