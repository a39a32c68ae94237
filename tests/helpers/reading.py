"""Texts read whole, and read token by token."""

import functools
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.interop.source import config_source
from jaxmoe.model import decoder, sampling
from jaxmoe.model.batch import make_batch


def model_of(name: str, variant: int = 0) -> tuple[Any, Any]:
    """Random weights and spec of a family's tiny config, or of one of its variants."""
    fields = ({}, *families.case_of(name).variants)[variant]
    spec = config_source(families.config_json(name, fields)).spec
    return weights_of(spec), spec


def weights_of(spec: Any) -> Any:
    """Random float32 weights."""
    noise = np.random.default_rng(0)
    draw = lambda p: jnp.asarray((p.init == "ones") + 0.2 * noise.standard_normal(p.shape), jnp.float32)
    return jax.tree.map(draw, spec.declared)


def prompt_of(spec: Any, length: int, seed: int = 1) -> list[int]:
    """Token ids."""
    return np.random.default_rng(seed).integers(3, spec.vocab_size, length).tolist()


@functools.partial(jax.jit, static_argnames="spec")
def _whole(params: Any, tokens: Any, *, spec: Any) -> Any:
    hidden, _ = decoder.hidden_states(params, spec, make_batch(tokens), dtype=jnp.float32)
    return decoder.logits(params, spec, hidden)[0]


def whole(params: Any, spec: Any, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of a text without a cache."""
    return np.asarray(_whole(params, np.asarray([ids], np.int32), spec=spec))


def greedy(params: Any, spec: Any, prompt: list[int], tokens: int, monkeypatch: Any) -> tuple[list[int], Any]:
    """The likeliest tokens, as `sampling.generate` finds them, and the logits (tokens, V) that it took them from."""
    logits = []
    draw = sampling._draw

    def noting(found, *rest):
        logits.append(np.asarray(found))
        return draw(found, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_draw", noting)
        new = sampling.generate(
            params, spec, prompt, tokens=tokens, temperature=0.0, seed=0, dtype=jnp.float32
        )
    return new, np.stack(logits)
