"""Models with random weights."""

from typing import Any

import families
import jax

from jaxmoe.interop.pretrained import from_config
from jaxmoe.model.module import MoEModel


def model_of(family: str, seed: int, **overrides: Any) -> MoEModel:
    """Of the tests' tiny config, in float32.

    The code that draws the weights is not optimised: that takes seconds for each model, and tests that draw by it do
    not ask how.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        return from_config(families.config_json(family, **overrides), "float32", seed=seed)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
