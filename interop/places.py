"""Where low-rank pairs of transformers' parameters lie in those of ours, and how new ones begin."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.interop.peft.today import Today
from jaxmoe.interop.rules import Binding
from jaxmoe.model.linear import LowRank
from jaxmoe.params import Param


class Width(NamedTuple):
    """Rank and scale of a pair."""

    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the factors of one parameter of transformers' model lie in those of ours.

    Attributes:
        name: in transformers' model.
        binding: of it.
        width: of its pair.
    """

    name: str
    binding: Binding
    width: Width

    @property
    def swapped(self) -> bool:
        """PEFT's A of an embedding is (r, tokens) and its B (width, r): ours are b transposed and a transposed."""
        return self.binding.target == "embed"

    @property
    def inputs_first(self) -> bool:
        """The tensor is (…, in, out)."""
        return self.binding.axes[-1] != (self.binding.declared.dims[-1],)

    def wrapped(self, model: Today) -> bool:
        """PEFT adds it to a bare parameter or an embedding."""
        kind = model.anatomy.by_name[self.name.rpartition(".")[0]].kind
        return self.swapped or kind in ("other", "router")

    @property
    def _outputs(self) -> tuple[str, ...]:
        first, second = self.binding.axes[-2:]
        return second if self.inputs_first else first

    @property
    def _batch(self) -> tuple[str, ...]:
        return tuple(letter for group in self.binding.axes[:-2] for letter in group)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(…, r, in) of A and (…, out, r) of B as they are for the tensor, before PEFT swaps those of an embedding."""
        sizes = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        batch = tuple(sizes[letter] for letter in self._batch)
        outputs = math.prod(sizes[letter] for letter in self._outputs)
        return (
            (*batch, self.width.rank, sizes[self.binding.declared.dims[-1]]),
            (*batch, outputs, self.width.rank),
        )

    def put(self, whole: Any, factors: Any) -> Any:
        """A and B of the whole parameter with the tensor's in their place; numpy's are changed where they are."""
        (a_at, b_at), (a, b) = self._indices(), factors
        sizes = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        a = a.reshape(whole[0][a_at].shape)
        b = einops.rearrange(b, f"{self._spelled} -> {' '.join([*self._free, 'r'])}", **self._known(sizes))
        if isinstance(whole[0], np.ndarray):
            whole[0][a_at], whole[1][b_at] = a, b
            return whole
        return whole[0].at[a_at].set(a), whole[1].at[b_at].set(b)

    def take(self, whole: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The tensor's A and B out of those of the whole parameter."""
        a_at, b_at = self._indices()
        b = einops.rearrange(whole[1][b_at], f"{' '.join([*self._free, 'r'])} -> {self._spelled}")
        return whole[0][a_at].reshape(self.shapes[0]), np.ascontiguousarray(b)

    def put_lengths(self, whole: np.ndarray, lengths: np.ndarray) -> None:
        """Put the magnitude of the tensor, (out,), in its place in that of the whole parameter."""
        sizes = dict(zip(self.binding.letters, self.binding.sizes, strict=True))
        outputs, free = f"({' '.join(self._outputs)})", " ".join(self._free)
        at = self._indices()[1]
        whole[at] = einops.rearrange(lengths, f"{outputs} -> {free}", **self._known(sizes))

    def take_lengths(self, whole: np.ndarray) -> np.ndarray:
        """The magnitude of the tensor, (out,), out of that of the whole parameter."""
        outputs, free = f"({' '.join(self._outputs)})", " ".join(self._free)
        return np.ascontiguousarray(einops.rearrange(whole[self._indices()[1]], f"{free} -> {outputs}"))

    @property
    def _free(self) -> list[str]:
        """Letters of the parameter's outputs that the tensor has."""
        return [letter for letter in self.binding.declared.dims[:-1] if letter not in self.binding.index]

    @property
    def _spelled(self) -> str:
        return " ".join([*self._batch, f"({' '.join(self._outputs)})", "r"])

    def _known(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in self._outputs}

    def _indices(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Of the parts in A and in B."""
        leading = self.binding.declared.dims[:-1]
        at = tuple(self.binding.index.get(letter, slice(None)) for letter in leading)
        return at[:-1], at


def declared_pair(declared: Param, places: Sequence[Place]) -> LowRank:
    """The declarations of an adapted parameter and its factors."""
    place = places[0]
    rank = place.width.rank
    shared = [letter for letter in place._outputs if letter not in (declared.dims[-2], *place.binding.index)]
    sizes = [
        1 if letter in shared else size for letter, size in zip(declared.dims, declared.shape, strict=True)
    ]
    factor = functools.partial(Param, init="zeros", role=declared.role, chooses=declared.chooses)
    a = factor(declared.dims[:-2] + "r" + declared.dims[-1], (*sizes[:-2], rank, sizes[-1]))
    b = factor(declared.dims[:-1] + "r", (*declared.shape[:-1], rank))
    return LowRank(declared, a, b, place.width.scale)


def declared_lengths(declared: Param) -> Param:
    """The declaration of the magnitude of an adapted parameter."""
    return Param(declared.dims[:-1], declared.shape[:-1], "zeros", "vector", chooses=declared.chooses)


def draw(init: str, key: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
    """A (…, r, in) and B (…, out, r) of one parameter, as peft's ``reset_lora_parameters`` draws them."""
    a_shape, b_shape = place.shapes
    rank, inputs = a_shape[-2:]
    zeros = jnp.zeros(b_shape, jnp.float32)
    if place.swapped:  # PEFT's A of an embedding is zero, and its B normal
        return jax.random.normal(key, a_shape), zeros
    if init == "gaussian":
        return jax.random.normal(key, a_shape) / rank, zeros
    if init == "orthogonal":
        return _orthogonal(key, a_shape, b_shape)
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), zeros


def _orthogonal(
    key: jax.Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Rows of A and columns of B in complementary subspaces of R^r, so that B A = 0 and both have gradients.

    As peft's ``orthogonal_init``, after https://datta0.github.io/posts/rethink-lora-init.
    """
    rank = a_shape[-2]
    of_basis, of_a, of_b = jax.random.split(key, 3)
    basis, _ = jnp.linalg.qr(jax.random.normal(of_basis, (rank, rank)))
    odd, even = basis[0::2], basis[1::2]
    a = (jax.random.normal(of_a, (a_shape[-1], rank // 2)) @ odd).T / 10
    b = jax.random.normal(of_b, (b_shape[-2], rank // 2)) @ even / 10
    return a, b
