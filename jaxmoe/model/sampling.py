"""Sampling: a text continued token by token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxmoe.errors import UserError
from jaxmoe.kernels.devices import Device
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.spec import ModelSpec
from jaxmoe.params import Tree


def generate(
    weights: Tree,
    spec: ModelSpec,
    prompt: list[int],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    dtype: Any,
    stop: int | None = None,
    device: Device | None = None,
) -> list[int]:
    """Sample a continuation.

    Each new token runs the whole sequence so far through the model: meant for looking at a model, not for
    serving it.

    Args:
        weights: the tree of `ModelSpec.declared`.
        spec: the model.
        prompt: token ids, at least one.
        tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the draws.
        dtype: compute dtype.
        stop: token that ends the text.
        device: that computes; None for the one at hand.

    Returns:
        The new token ids, without `stop`.

    Raises:
        UserError: the device has too little memory for so many tokens.
    """
    # Padded to one length, so that one compilation serves all tokens; causality hides what is not there yet.
    buffer = np.zeros((1, len(prompt) + tokens), np.int32)
    buffer[0, : len(prompt)] = prompt
    key = jax.random.key(seed)
    for end in range(len(prompt), len(prompt) + tokens):
        draw = jax.random.fold_in(key, end)
        try:
            tokens_BT = jnp.asarray(buffer)
            token = int(
                _next_token(
                    weights, tokens_BT, end - 1, draw, temperature, spec=spec, dtype=dtype, device=device
                )
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the device has no memory for a text of {buffer.size} tokens, {len(prompt)} of the prompt and "
                f"{tokens} more: ask for fewer tokens"
            ) from error
        if token == stop:
            return buffer[0, len(prompt) : end].tolist()
        buffer[0, end] = token
    return buffer[0, len(prompt) :].tolist()


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "device"))
def _next_token(
    weights: Tree,
    tokens: jax.Array,
    last: int,
    key: jax.Array,
    temperature: float,
    *,
    spec: ModelSpec,
    dtype: Any,
    device: Device | None,
) -> jax.Array:
    hidden, _ = decoder.hidden_states(weights, spec, make_batch(tokens), dtype=dtype, device=device)
    at_last = jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
    logits = decoder.logits(weights, spec, at_last)[0, 0]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def continue_text(
    weights: Tree, spec: ModelSpec, tokenizer: Tokenizer, prompt: str, *, stop: int | None, **options: Any
) -> str:
    """`generate` from text to text; an empty prompt begins with the `stop` token, as a new document does."""
    ids = tokenizer.encode(prompt).ids or [stop or 0]
    return tokenizer.decode(generate(weights, spec, ids, stop=stop, **options))
