"""One optimiser step of the same small model on the same batch: jaxmoe beside transformers on torch.

    python benchmarks/train_step.py            # needs torch (extra "torch")
    python benchmarks/train_step.py --length 4096 --dtype bfloat16 --frozen

Both start from the same weights and take the same tokens; AdamW with the same constants; float32 on the same
cores. They alternate in one process, so that a drift of the machine hits both. transformers is measured with
each of its own implementations of attention and experts, and the fastest of them is the peer. (Its batched_mm
is left out: it gathers the weights of every choice of every token, 19 GB for the first model.)

`--length` has as many tokens in a step as before, or one row: batch 1 at 4,096 tokens. `--frozen` trains norms and
routers alone, as with LoRA no matrix of attention or experts has a gradient. `--dtype bfloat16` is what jaxmoe
computes in from float32 weights and moments. transformers has no one way to do that and takes part in two:
"autocast" keeps float32 weights and casts them on the way, which is what its Trainer does with bf16=True and the
same arithmetic as ours; "bfloat16 weights" is model.to(bfloat16), whose weights and moments are bfloat16 too: less
work, and small updates are lost.

Variables of the environment that set numbers of threads or how memory is allocated are printed and stand in the
JSON. Neither library needs one: `env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS python …` measures without.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from common import print_table, variables, write_results

from jaxmoe.config import RunConfig
from jaxmoe.interop.source import Source
from jaxmoe.interop.torch_bridge import from_torch
from jaxmoe.model.batch import Batch, learning_batch
from jaxmoe.parallel.sharding import make_mesh, shardings
from jaxmoe.params import named
from jaxmoe.run.assemble import Assembled, assemble

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
TRAINED_BESIDE_FROZEN = ("norm", r"\.mlp\.gate\.")
"""With `--frozen`: regular expressions on the names of tensors, the same in a checkpoint and in transformers."""


def resized(size: dict[str, int], length: int) -> dict[str, int]:
    """The size with rows of `length`, as many of them as have the tokens of before, at least one."""
    return size | {"batch": max(1, size["batch"] * LENGTH // length)}


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


def train_norms_and_routers(model: Any) -> None:
    """Freeze the other parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in TRAINED_BESIDE_FROZEN))


def torch_step(
    model: Any, attention: str, experts: str, tokens: np.ndarray, *, autocast: bool = False
) -> Callable[[], float]:
    """A function that takes one step and returns the loss.

    Args:
        model: in the dtype of its weights; what has ``requires_grad`` is trained.
        attention: transformers' implementation.
        experts: the same.
        tokens: (B, T).
        autocast: compute in bfloat16 from float32 weights.
    """
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    ids = torch.from_numpy(tokens)
    computing = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with computing:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def assembled_run(
    source: Source,
    rows: int,
    length: int,
    *,
    dtype: str = "float32",
    frozen: bool = False,
    adapter: Mapping[str, Any] | None = None,
    quantization: str | None = None,
) -> Assembled:
    """A run of jaxmoe on `rows` of `length` tokens, with the constants that torch has here.

    Args:
        source: the model.
        rows: of a step.
        length: of a row.
        dtype: that it computes in.
        frozen: train norms and routers alone.
        adapter: the run's section of that name.
        quantization: of the weights under an adapter.
    """
    config = RunConfig.from_mapping(
        {
            "model": {
                "config": dict(source.raw),
                "dtype": dtype,
                "remat": False,
                "quantization": quantization,
            },
            "adapter": adapter,
            "data": {"path": "python:stdlib", "sequence_length": length},
            "optimizer": {"learning_rate": RATE, "schedule": "constant"},
            "train": {"steps": 1000, "batch_size": rows},
            "output_dir": "never-made",
            **({"trainable": list(TRAINED_BESIDE_FROZEN)} if frozen else {}),
        }
    )
    return assemble(config, make_mesh(devices=jax.devices()[:1]), source=source)


def first_weights(assembled: Assembled, weights: Any) -> Any:
    """Weights of a model as the run holds them, with the factors of a new adapter and quantised where it has that."""
    adapted = assembled.adapted
    if adapted is None:
        return weights
    held = [
        adapted.forms[name].quantize(weight) if name in adapted.forms else weight
        for name, weight in named(weights)
    ]
    return adapted.joined(
        jax.tree.unflatten(jax.tree.structure(weights), held), adapted.new_factors(jax.random.key(0))
    )


def jax_batch(tokens: np.ndarray) -> Batch:
    """Rows (B, T) that are one document each, as a batch to learn from."""
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    batch = learning_batch(tokens.astype(np.int32), positions, np.ones_like(positions))
    return jax.tree.map(jnp.asarray, batch)


def jax_step(model: Any, tokens: np.ndarray, **kind: Any) -> Callable[[], float]:
    """The same in jaxmoe, from the weights of a float32 model; `kind` is what `assembled_run` takes."""
    mine = from_torch(model)
    assembled = assembled_run(mine.source, *tokens.shape, **kind)
    with jax.set_mesh(assembled.mesh):
        weights = first_weights(assembled, mine.pure_params())
        weights = jax.tree.map(jnp.array, weights, assembled.dtypes)
        # Where a step leaves them: otherwise the second one would be compiled anew.
        state = assembled.begin(jax.device_put(weights, shardings(assembled.declared, assembled.mesh)))
    batch = jax.tree.map(lambda array: array[None], jax_batch(tokens))
    box = [state]

    def step() -> float:
        with jax.set_mesh(assembled.mesh):
            box[0], metrics = assembled.train_step(box[0], batch)
        return float(metrics["loss"])

    return step


def contestants(
    size: dict[str, int], tokens: np.ndarray, dtype: str, frozen: bool
) -> dict[str, Callable[[], float]]:
    """jaxmoe, and transformers in every way that computes in `dtype`."""
    steps = {"jaxmoe": jax_step(torch_model(size), tokens, dtype=dtype, frozen=frozen)}
    ways = {"": False} if dtype == "float32" else {", autocast": True, ", bfloat16 weights": False}
    for way, autocast in ways.items():
        for attention in ("sdpa", "eager"):
            for experts in ("eager", "grouped_mm"):
                model = torch_model(size)
                if way == ", bfloat16 weights":
                    model = model.to(torch.bfloat16)
                if frozen:
                    train_norms_and_routers(model)
                steps[f"transformers {attention}, {experts}{way}"] = torch_step(
                    model, attention, experts, tokens, autocast=autocast
                )
    return steps


def take_turns(
    name: str, steps: Mapping[str, Callable[[], float]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each contestant's steps, and its loss in step 2. What cannot run or takes over 20 s is left out.

    Args:
        name: of the model, for what is said on the way.
        steps: by contestant; those of jaxmoe are never left out.
        repeats: timed steps of each.
    """
    steps, losses = dict(steps), {}
    for contestant, step in list(steps.items()):
        try:
            step()
            start = time.perf_counter()
            losses[contestant] = step()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{name}: {contestant} cannot run here: {str(error).splitlines()[0]}")
            del steps[contestant]
            continue
        taken = time.perf_counter() - start
        print(f"{name}: {contestant}: step 2 took {taken:.2f} s", file=sys.stderr, flush=True)
        if taken > 20 and not contestant.startswith("jaxmoe"):
            print(f"{name}: {contestant} takes over 20 s a step: left out")
            del steps[contestant]
    seconds: dict[str, list[float]] = {contestant: [] for contestant in steps}
    for _ in range(repeats):
        for contestant, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[contestant].append(time.perf_counter() - start)
    return seconds, losses


def measure(
    name: str, repeats: int, length: int = LENGTH, dtype: str = "float32", frozen: bool = False
) -> list[dict[str, Any]]:
    """All contestants on one size, in turn."""
    size = resized(SIZES[name], length)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size["batch"], length))
    seconds, losses = take_turns(name, contestants(size, tokens, dtype, frozen), repeats)
    rate = {c: tokens.size / float(np.median(seconds[c])) for c in seconds}
    peer = max((c for c in seconds if c != "jaxmoe"), key=rate.__getitem__)
    return [
        {
            "model": name,
            "contestant": contestant + (" (the peer)" if contestant == peer else ""),
            "tokens_per_s": rate[contestant],
            "median_s": float(np.median(seconds[contestant])),
            "min_s": min(seconds[contestant]),
            "max_s": max(seconds[contestant]),
            "jaxmoe_is_faster_by": rate["jaxmoe"] / rate[contestant],
            "loss_of_step_2": losses[contestant],
        }
        for contestant in seconds
    ]


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", choices=SIZES, action="append")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a row, by default {LENGTH}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--frozen", action="store_true", help="train norms and routers alone")
    options = parser.parse_args()
    if options.length < 1 or options.repeats < 1:
        parser.error(f"--length {options.length}, --repeats {options.repeats}: expected 1 or more")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("variables:", " ".join(f"{name}={value}" for name, value in variables().items()) or "none set")
    kind = {"length": options.length, "dtype": options.dtype, "frozen": options.frozen}
    rows = [row for name in options.model or SIZES for row in measure(name, options.repeats, **kind)]
    print_table(rows)
    named = {f"_{options.length}": options.length != LENGTH, "_bfloat16": options.dtype != "float32"}
    suffix = "".join(text for text, is_other in (named | {"_frozen": options.frozen}).items() if is_other)
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "variables": variables(),
        "sequence_length": options.length,
        "dtype": options.dtype,
        "frozen": options.frozen,
        "repeats": options.repeats,
    }
    print(write_results(f"train_step{suffix}", rows, **about))


if __name__ == "__main__":
    main()
