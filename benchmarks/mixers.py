"""Token mixers beside the same layers of transformers on torch: milliseconds forward and backward, and memory.

    python benchmarks/mixers.py                      # needs torch (extra "torch")
    python benchmarks/mixers.py --only gated_delta --length 4096 --repeats 5

A layer has the published widths of heads and states, fewer heads and a narrower model, and random float32 weights.
Both get the same weights and inputs, and "error" is the largest difference of their outputs over the largest output.
They take turns, and the best time of each counts: once forward, and once with the gradients of inputs and weights.
torch's attention is sdpa; its recurrent mixers are what transformers has without CUDA kernels. "temp MB" is what XLA
plans for forward and backward beside weights and inputs, at the length and at twice that: recurrent mixers take twice
as much then, and attention no more than that.
"""

import argparse
import dataclasses
import logging
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

from jaxmoe.interop.torch_bridge import from_torch
from jaxmoe.model.batch import make_batch
from jaxmoe.model.mixers.context import make_context
from jaxmoe.params import Tree

EXPERTS = {"moe_intermediate_size": 64, "intermediate_size": 64, "num_experts_per_tok": 2, "vocab_size": 128}
LATENT = {
    **EXPERTS,
    "hidden_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 512,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer within a model of transformers.

    Attributes:
        model_type: of the model.
        module: path of the mixer in it.
        index: of the layer.
        fields: of the model's config.
    """

    model_type: str
    module: str
    index: int
    fields: Mapping[str, Any]


LAYERS = {
    "latent": Layer("deepseek_v3", "model.layers.0.self_attn", 0, LATENT),
    "latent, selected keys": Layer(
        "deepseek_v32",
        "model.layers.0.self_attn",
        0,
        {**LATENT, "index_n_heads": 8, "index_head_dim": 128, "index_topk": 1024},
    ),
    "Gated DeltaNet": Layer(
        "qwen3_next",
        "model.layers.0.linear_attn",
        0,
        {
            **EXPERTS,
            "hidden_size": 1024,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
    ),
    "Kimi Delta Attention": Layer(
        "kimi_linear",
        "model.layers.0.self_attn",
        0,
        {
            "hidden_size": 1024,
            "intermediate_size": 64,
            "moe_intermediate_size": 64,
            "vocab_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "pad_token_id": None,
            "linear_attn_config": {"head_dim": 128, "num_heads": 8, "short_conv_kernel_size": 4},
        },
    ),
    "lightning": Layer(
        "minimax",
        "model.layers.0.self_attn",
        0,
        {
            "vocab_size": 128,
            "intermediate_size": 64,
            "hidden_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Mamba 2": Layer(
        "nemotron_h",
        "model.layers.0.mixer",
        0,
        {
            "vocab_size": 128,
            "hidden_size": 1024,
            "layers_block_type": ["linear_attention", "moe"],
            "intermediate_size": 64,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "n_routed_experts": 4,
            "mamba_num_heads": 16,
            "n_groups": 2,
        },
    ),
    "Mamba": Layer(
        "jamba",
        "model.layers.0.mamba",
        0,
        {
            "vocab_size": 128,
            "hidden_size": 512,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "short convolution": Layer(
        "lfm2_moe",
        "model.layers.0.conv",
        0,
        {
            **EXPERTS,
            "hidden_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_dense_layers": 0,
            "layer_types": ["conv", "full_attention"],
        },
    ),
}


def torch_model(layer: Layer) -> Any:
    """A model with the layer, weights as transformers draws them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(layer.model_type, **layer.fields)
    config._attn_implementation = "sdpa"
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def torch_call(model: Any, layer: Layer, length: int) -> tuple[np.ndarray, np.ndarray, Callable[[bool], Any]]:
    """The mixer's input (1, T, D) in the model, its output, and a call of it, forward or with gradients."""
    module = model.get_submodule(layer.module)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, a, k: given.append((a, k)), with_kwargs=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (1, length)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    arguments, named = given[0]
    x = (named.get("hidden_states") if "hidden_states" in named else arguments[0]).detach()
    leaf = x.clone().requires_grad_()
    if "hidden_states" in named:
        named = named | {"hidden_states": leaf}
    else:
        arguments = (leaf, *arguments[1:])
    weights = [leaf, *(p for p in module.parameters() if p.requires_grad)]

    def output() -> torch.Tensor:
        out = module(*arguments, **named)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        out = output().numpy().copy()

    def call(backward: bool) -> None:
        if backward:
            torch.autograd.grad(output().sum(), weights, allow_unused=True)
        else:
            with torch.no_grad():
                output()

    return x.numpy(), out, call


def our_layer(model: Any, index: int) -> tuple[Any, Tree, Any]:
    """Mixer, parameters and spec of the model, of one of its layers."""
    mine = from_torch(model)
    params, spec = mine.pure_params(), mine.spec
    layers = [
        (place, jax.tree.map(lambda x, repeat=repeat: x[repeat], tree))
        for group, trees in zip(spec.groups, params["groups"], strict=True)
        for repeat in range(group.repeats)
        for place, tree in zip(group.pattern, trees, strict=True)
    ]
    place, tree = layers[index]
    return place.mixer, tree, spec


def our_functions(mixer: Any, spec: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(params, x (1, T, D)) → output, and gradients of its sum."""

    def forward(params: Tree, x: jax.Array) -> jax.Array:
        batch = make_batch(jnp.zeros(x.shape[:2], jnp.int32))
        context = make_context(spec.rotations, batch, x.dtype, packed=False)
        selection, _ = mixer.select(params, x, context, None)
        return mixer.apply(params, x, dataclasses.replace(context, selection=selection))

    return jax.jit(forward), jax.jit(
        jax.grad(lambda params, x: jnp.sum(forward(params, x)), argnums=(0, 1), allow_int=True)
    )


def best_of(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each; they take turns, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(found) for name, found in times.items()}


def temporaries(function: Any, params: Tree, width: int, length: int) -> float:
    """Megabytes."""
    x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    return function.lower(params, x).compile().memory_analysis().temp_size_in_bytes / 1e6


def measure(name: str, length: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    layer = LAYERS[name]
    model = torch_model(layer)
    x, want, theirs = torch_call(model, layer, length)
    mixer, params, spec = our_layer(model, layer.index)
    x_BTD = jnp.asarray(x)
    forward, both = our_functions(mixer, spec)
    error = float(np.abs(np.asarray(forward(params, x_BTD)) - want).max() / np.abs(want).max())
    row: dict[str, Any] = {"mixer": name, "as in": layer.model_type, "tokens": length, "error": error}
    for what, function, backward in (("forward", forward, False), ("and backward", both, True)):
        ours = lambda function=function: jax.block_until_ready(function(params, x_BTD))
        peer = lambda backward=backward: theirs(backward)
        found = best_of({"jaxmoe": ours, "torch": peer}, repeats)
        row |= {f"{what}: {who} ms": round(ms, 1) for who, ms in found.items()}
        row[f"{what}: ratio"] = round(found["torch"] / found["jaxmoe"], 2)
    row["temp MB"], row["temp MB, 2T"] = (
        round(temporaries(both, params, x.shape[-1], times * length)) for times in (1, 2)
    )
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for option in ("length", "repeats"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} {getattr(options, option)}: expected 1 or more")
    logging.disable(logging.WARNING)  # of transformers, that it has no kernels here
    rows = [measure(name, options.length, options.repeats) for name in options.only]
    print_table(rows)
    if options.only == list(LAYERS):
        print(write_results("mixers", rows, variables=variables(), repeats=options.repeats))


if __name__ == "__main__":
    main()
