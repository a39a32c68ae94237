"""Parts of sharded arrays, whole on every device."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def slice_bits(array: jax.Array, box: Sequence[slice]) -> jax.Array:
    """The part `box` of a sharded array as unsigned integers, whole on every device, so any process can fetch it.

    Memory and traffic are in proportion to the part. In several processes all must call it.

    Raises:
        TypeError: the array is on several devices without a `NamedSharding`.
    """
    sharding = array.sharding if len(array.sharding.device_set) > 1 else None
    if not isinstance(sharding, NamedSharding | None):
        raise TypeError(f"expected arrays with a NamedSharding, got {sharding}")
    starts = np.asarray([part.start for part in box], np.int32)
    return _slice_bits(array, starts, tuple(part.stop - part.start for part in box), sharding)


@functools.partial(jax.jit, static_argnames=("sizes", "sharding"))
def _slice_bits(
    array: jax.Array, starts: jax.Array, sizes: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """Each device cuts out what its own shard holds of the slice, at its place among zeros; the sum is the slice.

    Left to XLA's partitioner, a slice of a sharded array is a slice of the whole array, gathered on each device.
    Where the slice starts is no constant, so that all slices of one size share a compilation. Integers have no
    signalling NaN, -0.0 or subnormal that a sum could change.
    """
    spec = () if sharding is None else tuple(sharding.spec)
    summed = [name for names in spec if names for name in ([names] if isinstance(names, str) else names)]

    def cut(shard: jax.Array, starts: jax.Array) -> jax.Array:
        split = [axis for axis in range(array.ndim) if shard.shape[axis] < array.shape[axis]]
        held = [min(size, length) for size, length in zip(sizes, shard.shape, strict=True)]
        # Where the slice starts as this shard counts, which may be outside of it, and the nearest place inside.
        wanted = [
            starts[axis] - (jax.lax.axis_index(spec[axis]) * length if axis in split else 0)
            for axis, length in enumerate(shard.shape)
        ]
        nearest = [
            jnp.clip(start, 0, length - size)
            for start, length, size in zip(wanted, shard.shape, held, strict=True)
        ]
        # Numbers first: some of XLA's emitters make signalling NaNs quiet when they copy bfloat16.
        whole = jax.lax.bitcast_convert_type(shard, np.dtype(f"u{array.dtype.itemsize}"))
        bits = jax.lax.dynamic_slice(whole, nearest, held)
        for axis in split:
            index = wanted[axis] - nearest[axis] + jnp.arange(sizes[axis])
            inside = (index >= 0) & (index < held[axis])
            inside = jnp.expand_dims(inside, [other for other in range(array.ndim) if other != axis])
            bits = jnp.where(inside, jnp.take(bits, index, axis, mode="clip"), 0)
        return jax.lax.psum(bits, tuple(summed)) if summed else bits

    if sharding is None:
        return cut(array, starts)
    specs = (sharding.spec, PartitionSpec())
    return jax.shard_map(cut, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec())(array, starts)
