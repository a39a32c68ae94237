"""Tokens per second: with what is cached of a text, and by the whole text again for every token.

    python benchmarks/generation.py
    python benchmarks/generation.py --dtype bfloat16

A model of width 512 with random weights continues texts of two lengths. Reading the prompt is timed apart. Both ways
take turns, and the best time of each counts; what they compile is not in it.
"""

import argparse
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import print_table, variables, write_results

from jaxmoe.interop.pretrained import from_config
from jaxmoe.model import decoder
from jaxmoe.model.batch import make_batch
from jaxmoe.model.sampling import Generator

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
LENGTHS = (256, 2048)
NEW = 24


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def likeliest(params: Any, tokens: jax.Array, last: int, *, spec: Any, dtype: Any) -> jax.Array:
    """The token after place `last` of a padded text (1, T), which is run through the model as a whole."""
    hidden, _ = decoder.hidden_states(params, spec, make_batch(tokens), dtype=dtype)
    at_last = jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
    return jnp.argmax(decoder.logits(params, spec, at_last)[0, 0])


def measure(
    config: Mapping[str, Any], length: int, dtype: str, repeats: int, new: int = NEW
) -> dict[str, Any]:
    """One length: seconds of the prompt, tokens per second of both ways, and how many tokens they agree in.

    Args:
        config: of the model.
        length: of the prompt.
        dtype: of weights and computation.
        repeats: of which the best counts.
        new: tokens that are added with the cache; the other way adds two.
    """
    model = from_config(config, dtype)
    params, spec = model.pure_params(), model.spec
    prompt = np.random.default_rng(0).integers(0, spec.vocab_size, length).tolist()
    text = np.zeros((1, length + new), np.int32)
    text[0, :length] = prompt
    prompt_s, cached_s, whole_s = [], [], []
    for _ in range(repeats + 1):  # the first one compiles
        tokens = Generator(params, spec, dtype=model.dtype).stream(
            prompt, tokens=new, temperature=0.0, seed=0
        )
        start = time.perf_counter()
        cached = [next(tokens)]
        read = time.perf_counter()
        cached += tokens
        prompt_s.append(read - start)
        cached_s.append((time.perf_counter() - read) / (new - 1))
        whole = []
        start = time.perf_counter()
        for end in (length, length + 1):
            whole.append(int(likeliest(params, text, end - 1, spec=spec, dtype=model.dtype)))
            text[0, end] = whole[-1]
        whole_s.append((time.perf_counter() - start) / len(whole))
    best = {name: min(times[1:]) for name, times in {"cached": cached_s, "whole": whole_s}.items()}
    return {
        "dtype": dtype,
        "prompt": length,
        "prompt_s": min(prompt_s[1:]),
        "cached_tokens_per_s": 1 / best["cached"],
        "whole_tokens_per_s": 1 / best["whole"],
        "faster_by": best["whole"] / best["cached"],
        "first_tokens_agree": cached[: len(whole)] == whole,
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected 1 or more")
    rows = [measure(CONFIG, length, options.dtype, options.repeats) for length in LENGTHS]
    print_table(rows)
    name = "generation" + ("" if options.dtype == "float32" else f"_{options.dtype}")
    print(write_results(name, rows, variables=variables(), repeats=options.repeats))


if __name__ == "__main__":
    main()
