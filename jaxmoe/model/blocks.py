"""What a layer is made of: a token mixer and a feed-forward, each a frozen spec that acts.

A spec declares its parameters, applies itself, counts what it costs, checks itself and describes itself. Nobody
outside asks which one it is: what is said of it below is all that the rest of the code knows.
"""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import jax

from jaxmoe.model.feed_forward.router import RouterStats
from jaxmoe.model.mixers.context import Context
from jaxmoe.model.mixers.rope import RopeSpec
from jaxmoe.model.mixers.selected_keys import Selection
from jaxmoe.params import Tree

Slot = tuple[Tree, jax.Array]
"""A cache of all repeats of a layer, and () int32, which of them is meant."""


class Block(abc.ABC):
    """What mixers and feed-forwards have in common. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def params(self, width: int) -> Tree:
        """Declarations of its parameters, as the part of its layer's tree that is its own.

        Args:
            width: D.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """A few words with its sizes, such as ``attention 32/4 heads of 128``."""

    def traits(self) -> Iterator[str]:
        """What sets it apart from the plainest of its kind, a word or two each."""
        return iter(())

    def problems(self) -> Iterator[str]:
        """What of it contradicts itself, in the words of config.json."""
        return iter(())

    def idle_params(self, width: int) -> int:
        """How many of its parameters a token is not multiplied with."""
        del width
        return 0


class Mixer(Block):
    """What passes between the tokens of a document, never from a later one to an earlier one.

    Attributes:
        rewinds: a cache can go on from any earlier token of its text, as if those after it had never been there.
    """

    rewinds: ClassVar[bool] = True

    @abc.abstractmethod
    def apply(self, params: Tree, x_BTD: jax.Array, context: Context) -> jax.Array:
        """What the layer adds to its residual stream for normed activations x.

        Args:
            params: the layer's, in the compute dtype.
            x_BTD: (B, T, D).
            context: of the batch.

        Returns:
            (B, T, D).
        """

    def select(
        self, params: Tree, x_BTD: jax.Array, context: Context, slot: Slot | None
    ) -> tuple[Selection, Tree]:
        """The keys that this layer and those after it see, found before it is applied: `Context.selection` of them all.

        By default those that a layer before has selected.

        Args:
            params, x_BTD, context: as in `apply`, or in `decode` where there is a cache.
            slot: its cache and which repeat it is; None where every token is at hand.

        Returns:
            The selection, and the cache with what selecting has to know of these tokens.
        """
        del params, x_BTD
        return context.selection, None if slot is None else slot[0]

    def unselected(self, x_BTD: jax.Array, context: Context, slot: Slot | None) -> jax.Array | None:
        """What stands for keys before they are selected, of the shape that `select` gives; None if it selects none."""
        del x_BTD, context, slot
        return None

    @abc.abstractmethod
    def init_cache(self, repeats: int, batch: int, length: int, dtype: Any) -> Tree:
        """What it keeps of tokens that were read, before there are any: arrays whose axes do not shrink with `length`.

        Args:
            repeats: L, all layers of a group that it is in at one place: the first axis of every array.
            batch: B.
            length: tokens that a text has at most.
            dtype: compute dtype.
        """

    @abc.abstractmethod
    def decode(
        self, params: Tree, x_BTD: jax.Array, context: Context, cache: Tree, repeat: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """`apply` to tokens that follow on what the cache has, which is nothing where the context is fresh.

        Padding comes after a row's last token and may reach past the end of the cache; `Context.valid` tells it. What a
        cache has at positions from the first of these tokens on is void.

        Args:
            params: the layer's, in the compute dtype.
            x_BTD: (B, T, D), at consecutive positions.
            context: of these tokens alone, with one document per row.
            cache: as from `init_cache`.
            repeat: () int32, which of the L layers this is.

        Returns:
            (B, T, D), and the cache with these tokens in it.
        """

    def rotations(self) -> frozenset[RopeSpec]:
        """The rotations whose tables it looks for in the context."""
        return frozenset()

    def mixing_flops(self, length: int) -> float:
        """FLOPs of the forward pass per token, at the mean over a document of `length` tokens, without products
        with parameters."""
        del length
        return 0.0


class FeedForward(Block):
    """What happens to each token by itself."""

    def sparse_params(self, tokens: int) -> tuple[str, ...]:
        """Names in its tree of those parameters of which so few tokens read a part. They may come as a `Repeat`."""
        del tokens
        return ()

    @abc.abstractmethod
    def apply(
        self, params: Tree, x_BTD: jax.Array, stream_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, RouterStats | None]:
        """What the layer adds to its residual stream, and the statistics of its router, if it has one.

        Args:
            params: the layer's, in the compute dtype.
            x_BTD: (B, T, D), normed activations.
            stream_BTD: (B, T, D), the residual stream that they are the norm of.
            context: of the batch.
        """
