"""One optimiser step of the same small model on the same batch: jaxmoe beside transformers on torch.

    python benchmarks/train_step.py            # needs torch (extra "torch")

Both start from the same weights and take the same tokens; AdamW with the same constants; float32 on the same
cores. They alternate in one process, so that a drift of the machine hits both. transformers is measured with
each of its own implementations of attention and experts, and the fastest of them is the peer. (Its batched_mm
is left out: it gathers the weights of every choice of every token, 19 GB for the first model.)
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from common import print_table, write_results

from jaxmoe.config import RunConfig
from jaxmoe.interop.torch_bridge import from_torch
from jaxmoe.model.batch import learning_batch
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run.assemble import assemble

SIZES = {
    "quickstart": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "moe_intermediate_size": 192,
        "num_experts": 16,
        "top_k": 2,
        "batch": 16,
    },
    "more experts": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 128,
        "num_experts": 64,
        "top_k": 8,
        "batch": 8,
    },
    "wider": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 384,
        "num_experts": 16,
        "top_k": 4,
        "batch": 8,
    },
}
LENGTH, VOCAB = 256, 4096
RATE = 1e-3


def torch_model(size: dict[str, int]) -> Any:
    """The model in transformers, float32."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=size["hidden_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=1,
        moe_intermediate_size=size["moe_intermediate_size"],
        num_experts=size["num_experts"],
        num_experts_per_tok=size["top_k"],
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).float().train()


def torch_step(model: Any, attention: str, experts: str, tokens: np.ndarray) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
    )
    ids = torch.from_numpy(tokens)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def jax_step(model: Any, tokens: np.ndarray) -> Callable[[], float]:
    """The same in jaxmoe."""
    mine = from_torch(model)
    config = RunConfig.from_mapping(
        {
            "model": {"config": dict(mine.source.raw), "dtype": "float32", "remat": False},
            "data": {"path": "python:stdlib", "sequence_length": LENGTH},
            "optimizer": {"learning_rate": RATE, "schedule": "constant"},
            "train": {"steps": 1000, "batch_size": len(tokens)},
            "output_dir": "never-made",
        }
    )
    assembled = assemble(config, make_mesh(), source=mine.source)
    with jax.set_mesh(assembled.mesh):
        state = assembled.begin(jax.tree.map(jnp.array, mine.pure_params()))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(tokens), 1))
    batch = learning_batch(tokens.astype(np.int32), positions, np.ones_like(positions))
    batch = jax.tree.map(lambda array: jnp.asarray(array)[None], batch)
    box = [state]

    def step() -> float:
        with jax.set_mesh(assembled.mesh):
            box[0], metrics = assembled.train_step(box[0], batch)
        return float(metrics["loss"])

    return step


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """All contestants on one size, in turn."""
    size = SIZES[name]
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size["batch"], LENGTH))
    steps: dict[str, Callable[[], float]] = {"jaxmoe": jax_step(torch_model(size), tokens)}
    for attention in ("sdpa", "eager"):
        for experts in ("eager", "grouped_mm"):
            steps[f"transformers {attention}, {experts}"] = torch_step(
                torch_model(size), attention, experts, tokens
            )
    losses, seconds = {}, {contestant: [] for contestant in steps}
    for contestant, step in list(steps.items()):
        start = time.perf_counter()
        try:
            losses[contestant] = [step(), step()]
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{name}: {contestant} cannot run here: {str(error).splitlines()[0]}")
            del steps[contestant]
            continue
        if (time.perf_counter() - start) / 2 > 20:
            print(f"{name}: {contestant} takes over 20 s a step: left out")
            del steps[contestant]
    for _ in range(repeats):
        for contestant, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[contestant].append(time.perf_counter() - start)
    rate = {c: size["batch"] * LENGTH / float(np.median(seconds[c])) for c in steps}
    peer = max((c for c in steps if c != "jaxmoe"), key=rate.__getitem__)
    return [
        {
            "model": name,
            "contestant": contestant + (" (the peer)" if contestant == peer else ""),
            "tokens_per_s": rate[contestant],
            "median_s": float(np.median(seconds[contestant])),
            "min_s": min(seconds[contestant]),
            "max_s": max(seconds[contestant]),
            "jaxmoe_is_faster_by": rate["jaxmoe"] / rate[contestant],
            "loss_of_step_2": losses[contestant][1],
        }
        for contestant in steps
    ]


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", choices=SIZES, action="append")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [row for name in options.model or SIZES for row in measure(name, options.repeats)]
    print_table(rows)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(
        write_results("train_step", rows, versions=versions, sequence_length=LENGTH, repeats=options.repeats)
    )


if __name__ == "__main__":
    main()
