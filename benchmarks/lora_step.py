"""One step of LoRA and of QLoRA beside a full one, and beside transformers with PEFT.

    python benchmarks/lora_step.py            # needs torch and PEFT (extra "torch")
    python benchmarks/lora_step.py --quick    # the first model, two repeats
    python benchmarks/lora_step.py --rank 16

The models, tokens and constants are those of train_step.py, and a model as wide as small published ones; float32, all
from the same weights. Adapters are on attention and on experts, of rank 16, in the narrow models of rank 4: for widths
of 256 and 512 what rank 32 is for 2,048 and 4,096. (Of rank 16 they would be a tenth of every product there, and in
the backward pass a quarter.) AdamW updates what is trained. PEFT adapts experts by `target_parameters`; it is measured
with transformers' eager and grouped experts, and the faster one is the peer. Everyone alternates in one process, so
that a drift of the machine hits all.

What is aimed at: a LoRA step takes at most 0.75 of a full step's time, and is at least 1.5 times as fast as PEFT's.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from common import print_table, variables, write_results
from train_step import LENGTH, SIZES, VOCAB, jax_step, take_turns, torch_model, torch_step

ALPHA = 8
WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 768,
    "num_experts": 16,
    "top_k": 4,
    "batch": 4,
}
MODELS = SIZES | {"wide": WIDE}
RANKS = dict.fromkeys(SIZES, 4) | {"wide": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OURS = {"full": "jaxmoe, full", "lora": "jaxmoe, LoRA", "qlora": "jaxmoe, QLoRA"}
MOST_OF_FULL, LEAST_OVER_PEFT = 0.75, 1.5


def peft_step(size: dict[str, int], experts: str, tokens: np.ndarray, rank: int) -> Callable[[], float]:
    """A step of transformers with PEFT.

    Args:
        size: of the model.
        experts: transformers' implementation.
        tokens: (B, T).
        rank: of the adapters.
    """
    model = torch_model(size)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=ALPHA,
        target_modules=ATTENTION,
        target_parameters=EXPERTS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what has no bias
        peft.inject_adapter_in_model(config, model)
    return torch_step(model, "sdpa", experts, tokens)


def contestants(size: dict[str, int], tokens: np.ndarray, rank: int) -> dict[str, Callable[[], float]]:
    """Steps by the names of who takes them."""
    adapter = {"rank": rank, "alpha": float(ALPHA), "target_modules": ATTENTION, "target_parameters": EXPERTS}
    ours = {
        OURS["full"]: {},
        OURS["lora"]: {"adapter": adapter},
        OURS["qlora"]: {"adapter": adapter, "quantization": "nf4"},
    }
    steps = {name: jax_step(torch_model(size), tokens, **kind) for name, kind in ours.items()}
    for experts in ("eager", "grouped_mm"):
        steps[f"transformers and PEFT, {experts}"] = peft_step(size, experts, tokens, rank)
    return steps


def measure(name: str, size: dict[str, int], length: int, repeats: int, rank: int) -> list[dict[str, Any]]:
    """All contestants on one size, in turn."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size["batch"], length))
    seconds, losses = take_turns(name, contestants(size, tokens, rank), repeats)
    median = {contestant: float(np.median(times)) for contestant, times in seconds.items()}
    peer = min((one for one in median if one not in OURS.values()), key=median.__getitem__, default=None)
    return [
        {
            "model": name,
            "rank": rank,
            "contestant": contestant + (" (the peer)" if contestant == peer else ""),
            "median_s": median[contestant],
            "min_s": min(seconds[contestant]),
            "max_s": max(seconds[contestant]),
            "over_full": median[contestant] / median[OURS["full"]],
            "faster_than_peft_by": None if peer is None else median[peer] / median[contestant],
            "loss_of_step_2": losses[contestant],
        }
        for contestant in seconds
    ]


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model, whether its LoRA step is as fast as is aimed at."""
    return [
        {
            "model": row["model"],
            "over_full": row["over_full"],
            "aim": f"at most {MOST_OF_FULL}",
            "faster_than_peft_by": row["faster_than_peft_by"],
            "and": f"at least {LEAST_OVER_PEFT}",
            "reached": row["over_full"] <= MOST_OF_FULL
            and (row["faster_than_peft_by"] or 0.0) >= LEAST_OVER_PEFT,
        }
        for row in rows
        if row["contestant"] == OURS["lora"]
    ]


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", type=int, help="of the adapters, instead of each model's own")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--quick", action="store_true", help="one model, two repeats, nothing written")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected 1 or more")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("variables:", " ".join(f"{name}={value}" for name, value in variables().items()) or "none set")
    names = options.model or list(MODELS)[: 1 if options.quick else None]
    repeats = 2 if options.quick else options.repeats
    rows = [
        row
        for name in names
        for row in measure(name, MODELS[name], LENGTH, repeats, options.rank or RANKS[name])
    ]
    print_table(rows)
    print_table(aims(rows))
    if not options.quick:
        versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        about = {"versions": versions, "variables": variables(), "repeats": repeats}
        kind = [f"rank_{options.rank}"] if options.rank else []
        name = "_".join(["lora_step", *kind, *(options.model or [])]).replace(" ", "_")
        print(write_results(name, rows, **about))


if __name__ == "__main__":
    main()
