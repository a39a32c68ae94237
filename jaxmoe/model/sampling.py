"""Sampling: a text continued token by token."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxmoe.errors import UserError
from jaxmoe.kernels.devices import Device
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch
from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import Tree

_SMALLEST = 64
"""Lengths are padded to powers of two from here on, so that few compilations serve all texts."""

_PART = 512
"""Tokens at most that are read at once after others: their scores go over a whole cache."""


class Generator:
    """A model with a text that it reads and continues, and the cache of what it has read.

    A text that begins like the one before, such as a dialogue with one more turn, is read from where they part.

    Attributes:
        tokens: ids of the text that is in the cache.
    """

    def __init__(self, weights: Tree, spec: ModelSpec, *, dtype: Any, device: Device | None = None):
        """Begin without a text.

        Args:
            weights: the tree of `ModelSpec.declared`.
            spec: the model.
            dtype: compute dtype, also of the cache.
            device: that computes; None for the one at hand.
        """
        self.tokens: list[int] = []
        self._weights = weights
        self._options = {"spec": spec, "dtype": dtype, "device": device}
        self._rotations = spec.rotations
        self._rewinds = all(layer.mixer is None or layer.mixer.rewinds for layer in spec.layers)
        self._cache: Any = None
        self._capacity = 0
        self._rotated_for: list[int] = []
        self._logits: Any = None

    def feed(self, ids: Sequence[int], *, ahead: int = 0) -> jax.Array:
        """Read a text.

        Args:
            ids: all of it, at least one token.
            ahead: how many tokens may follow: they have room in the cache, and rotations that go by the length of a
                text are those of so long a one.

        Returns:
            Logits (V,) of the token after it, float32.

        Raises:
            ValueError: there are no tokens.
            UserError: the device has too little memory for so many tokens.
        """
        if not ids:
            raise ValueError("a text to continue has at least one token")
        length = len(ids) + ahead
        rotated_for = [rope.shortest(length) for rope in self._rotations]
        kept = self._common(ids) if rotated_for == self._rotated_for else 0
        self._rotated_for = rotated_for
        return self._read(ids[kept:], kept, length)

    def stream(
        self,
        ids: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        seed: int,
        stop: int | Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Read a text and sample a continuation of it.

        Args:
            ids: all of the text, at least one token.
            tokens: how many to add at most.
            temperature: divides the logits; 0 takes the likeliest token.
            seed: of the draws.
            stop: token that ends the text, or several such.

        Yields:
            The new token ids, each before the next one is computed, without that of `stop`.

        Raises:
            UserError: the device has too little memory for so many tokens.
        """
        length, stops = len(ids) + tokens, _several(stop)
        logits, key = self.feed(ids, ahead=tokens), jax.random.key(seed)
        for end in range(len(ids), length):
            token = int(_draw(logits, key, end, temperature))
            if token in stops:
                return
            yield token
            if end + 1 < length:
                logits = self._read([token], end, length)

    def _common(self, ids: Sequence[int]) -> int:
        """How many of the first tokens need not be read again."""
        pairs = zip(ids, self.tokens, strict=False)
        parted = next((place for place, (new, old) in enumerate(pairs) if new != old), None)
        common = min(len(ids), len(self.tokens)) if parted is None else parted
        if common == len(self.tokens):
            return common
        # The logits after the last token are at hand only where the text before ended with it.
        return min(common, len(ids) - 1) if self._rewinds else 0

    def _read(self, ids: Sequence[int], start: int, length: int) -> jax.Array:
        """Logits (V,) after `ids`, which follow on the first `start` tokens of the text at hand.

        Args:
            length: of the text when it is complete.
        """
        if not ids:
            return self._logits
        # Whatever fails here leaves no text behind: the cache is given away to the step that writes it.
        before, self.tokens = self.tokens[:start], []
        cache, self._cache = self._cache, None
        needed = _padded_length(length)
        try:
            if not start:
                cache, self._capacity = None, needed
            elif needed > self._capacity:
                cache, self._capacity = _grown(cache, needed, **self._options), needed
            size = len(ids) if cache is None else _PART
            for first in range(0, len(ids), size):
                part = ids[first : first + size]
                padded = 1 if cache is not None and len(part) == 1 else _padded_length(len(part))
                tokens = np.zeros((1, padded), np.int32)
                tokens[0, : len(part)] = part
                # Of a step it is no part: one compilation more would serve nothing.
                capacity = self._capacity if cache is None else 0
                place = (start + first, len(part), length)
                self._logits, cache = _extend(
                    self._weights, cache, tokens, *place, capacity=capacity, **self._options
                )
            jax.block_until_ready(self._logits)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            known = start + len(ids)
            raise UserError(
                f"the device has no memory for a text of {length} tokens, {known} so far and "
                f"{length - known} more: ask for fewer tokens"
            ) from error
        self.tokens, self._cache = [*before, *ids], cache
        return self._logits


def stream(
    weights: Tree,
    spec: ModelSpec,
    prompt: Sequence[int],
    *,
    dtype: Any,
    device: Device | None = None,
    **options: Any,
) -> Iterator[int]:
    """`generate`, token by token as they are sampled."""
    return Generator(weights, spec, dtype=dtype, device=device).stream(prompt, **options)


def generate(
    weights: Tree,
    spec: ModelSpec,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    dtype: Any,
    stop: int | Sequence[int] | None = None,
    device: Device | None = None,
) -> list[int]:
    """Sample a continuation.

    Args:
        weights: the tree of `ModelSpec.declared`.
        spec: the model.
        prompt: token ids, at least one.
        tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the draws.
        dtype: compute dtype.
        stop: token that ends the text, or several such.
        device: that computes; None for the one at hand.

    Returns:
        The new token ids, without that of `stop`.

    Raises:
        UserError: the device has too little memory for so many tokens.
    """
    options = {"tokens": tokens, "temperature": temperature, "seed": seed, "stop": stop}
    return list(stream(weights, spec, prompt, dtype=dtype, device=device, **options))


def continue_text(
    weights: Tree,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: int | Sequence[int] | None,
    **options: Any,
) -> str:
    """`generate` from text to text; an empty prompt begins with the (first) `stop` token, as a new document does."""
    ids = tokenizer.encode(prompt).ids or [*_several(stop), 0][:1]
    return tokenizer.decode(generate(weights, spec, ids, stop=stop, **options))


def _several(stop: int | Sequence[int] | None) -> Sequence[int]:
    return () if stop is None else (stop,) if isinstance(stop, int) else stop


def _padded_length(length: int) -> int:
    return max(_SMALLEST, 1 << (length - 1).bit_length())


@functools.partial(
    jax.jit, static_argnames=("capacity", "spec", "dtype", "device"), donate_argnames=("cache",)
)
def _extend(
    weights: Tree,
    cache: decoder.Cache | None,
    tokens: jax.Array,
    start: int,
    count: int,
    length: int,
    *,
    capacity: int,
    spec: ModelSpec,
    dtype: Any,
    device: Device | None,
) -> tuple[jax.Array, decoder.Cache]:
    """Logits (V,) after the first `count` of tokens (1, T), which follow on `start` others, and the cache with them.

    Args:
        cache: of those before; None where there are none, and it is made.
        length: of the text when it is complete.
        capacity: tokens that a cache has room for, where it is made.
    """
    fresh = cache is None
    if cache is None:
        cache = decoder.init_cache(spec, 1, capacity, dtype)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    batch = Batch(tokens, start + index, (index < count).astype(jnp.int32))
    hidden, cache = decoder.decode(
        weights, spec, batch, cache, dtype=dtype, fresh=fresh, length=length, device=device
    )
    at_last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return decoder.logits(weights, spec, at_last)[0, 0], cache


@functools.partial(jax.jit, static_argnames=("capacity", "spec", "dtype", "device"))
def _grown(
    cache: decoder.Cache, capacity: int, *, spec: ModelSpec, dtype: Any, device: Device | None
) -> decoder.Cache:
    """The cache with room for `capacity` tokens."""
    del device
    put = lambda whole, old: jax.lax.dynamic_update_slice(whole, old, (0,) * old.ndim)
    return jax.tree.map(put, decoder.init_cache(spec, 1, capacity, dtype), cache)


@jax.jit
def _draw(logits: jax.Array, key: jax.Array, end: int, temperature: float) -> jax.Array:
    """The token at place `end` of a text, () int32."""
    drawn = jax.random.categorical(jax.random.fold_in(key, end), logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))
