"""Gradients of every family's tiny model in bfloat16 over a row of 8,192 tokens: `make long-rows`.

    cd tests && python -m helpers.long_rows [FAMILY …]

Too long for the tests, which have the same of each mixer. Exit status 1 where a gradient is not finite.
"""

import sys
import time
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.interop.families import FAMILIES
from jaxmoe.interop.source import config_source
from jaxmoe.model import decoder
from jaxmoe.model.batch import Batch, make_batch, next_token_targets
from jaxmoe.params import named
from jaxmoe.training.cross_entropy import linear_cross_entropy

LENGTH, BORDER = 8192, 5000
"""Tokens of a row, and where its second document begins."""


def not_finite(name: str) -> tuple[float, list[str]]:
    """The loss of a family's tiny model, random weights of 0.2, and the parameters whose gradient is not finite."""
    spec, rng = config_source(families.config_json(name)).spec, np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(
            (p.init == "ones") + 0.2 * rng.standard_normal(p.shape), p.dtype(jnp.dtype("bfloat16"))
        ),
        spec.declared,
    )
    tokens = jnp.asarray(rng.integers(3, spec.vocab_size, (1, LENGTH)))
    segments = jnp.asarray(1 + (np.arange(LENGTH)[None] >= BORDER), jnp.int32)

    @jax.jit
    def run(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> jax.Array:
            hidden, _ = decoder.hidden_states(params, spec, batch, dtype=jnp.dtype("bfloat16"), remat=True)
            targets = next_token_targets(batch.tokens, batch.segment_ids)
            return linear_cross_entropy(hidden, decoder.output_head(params, spec), targets) / LENGTH

        return jax.value_and_grad(loss)(params)

    loss, grads = run(params, make_batch(tokens, None, segments))
    bad = [key for key, grad in named(grads) if not np.isfinite(np.asarray(grad, np.float32)).all()]
    return float(loss), bad


def main(names: list[str]) -> int:
    failed = False
    for name in names or FAMILIES:
        start = time.perf_counter()
        loss, bad = not_finite(name)
        failed |= bool(bad) or not np.isfinite(loss)
        told = f"not finite: {', '.join(bad)}" if bad else "all gradients finite"
        print(f"{name}: loss {loss:.4f}, {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
