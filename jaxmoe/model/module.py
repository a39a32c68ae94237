"""The Flax face of a model: parameters as an nnx module, the computation a jitted pure function."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.kernels.devices import Device, describe
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch, make_batch
from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import Tree


class MoEModel(nnx.Module):
    """A mixture-of-experts language model.

    Attributes:
        spec: its `ModelSpec`.
        params: the parameter tree of `ModelSpec.declared`, each leaf an `nnx.Param`.
        dtype: compute dtype.
        mesh: the mesh that the parameters are sharded on, or None.
        source: where the weights were read from (a `jaxmoe.interop.source.Source`); export follows it.
    """

    def __init__(
        self, spec: ModelSpec, params: Tree, dtype: Any, mesh: Mesh | None = None, source: Any = None
    ):
        self.spec = spec
        self.params = nnx.data(jax.tree.map(nnx.Param, params))
        self.dtype = jnp.dtype(dtype)
        self.mesh = mesh
        self.source = source

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Next-token logits.

        Args:
            tokens: (B, T) int32.
            positions: (B, T) int32; by default counted from 0 in every document.
            segment_ids: (B, T) int32, documents of a row numbered from 1, padding 0; by default every row is
                one document.

        Returns:
            (B, T, V) float32.
        """
        batch = make_batch(
            jnp.asarray(tokens),
            None if positions is None else jnp.asarray(positions),
            None if segment_ids is None else jnp.asarray(segment_ids),
        )
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            params = self.pure_params()
            (device, *_) = jax.tree.leaves(params)[0].devices()
            return _logits(params, self.spec, batch, self.dtype, describe(device))

    def pure_params(self) -> Tree:
        """The parameters as plain arrays, for pure functions."""
        return jax.tree.map(
            lambda leaf: leaf[...], self.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
        )


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "device"))
def _logits(params: Tree, spec: ModelSpec, batch: Batch, dtype: Any, device: Device) -> jax.Array:
    hidden, _ = decoder.hidden_states(params, spec, batch, dtype=dtype, device=device)
    return decoder.logits(params, spec, hidden)
