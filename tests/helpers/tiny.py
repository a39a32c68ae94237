"""Checkpoints of tiny models, written without any of jaxmoe's own rules, and without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import families
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Layout = Literal["experts", "fused"]

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
"""Those whose checkpoints can be written here; their configs are the ones of `families`."""

DTYPES: Mapping[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}

_GATE_UP_DOWN = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def tensor_shapes(
    config: Mapping[str, Any], layout: Layout = "experts"
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint, in the order of the model.

    Args:
        config: a config.json with all of its fields spelt out.
        layout: experts one by one, or fused as transformers holds them in memory.
    """
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config, layer, layout):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def _layer_shapes(
    config: Mapping[str, Any], layer: int, layout: Layout
) -> Iterator[tuple[str, tuple[int, ...]]]:
    family, width = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or width // heads
    wide = {"q": (heads * head, width), "k": (kv_heads * head, width), "v": (kv_heads * head, width)}
    for name, shape in (wide | {"o": (width, heads * head)}).items():
        yield f"self_attn.{name}_proj.weight", shape
        if config.get("attention_bias"):
            yield f"self_attn.{name}_proj.bias", shape[:1]
    if family != "mixtral":
        yield "self_attn.q_norm.weight", (head if family == "qwen3_moe" else heads * head,)
        yield "self_attn.k_norm.weight", (head if family == "qwen3_moe" else kv_heads * head,)
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    if family == "qwen3_moe" and (
        layer in config.get("mlp_only_layers", []) or (layer + 1) % config.get("decoder_sparse_step", 1)
    ):
        dense = config["intermediate_size"]
        yield "mlp.gate_proj.weight", (dense, width)
        yield "mlp.up_proj.weight", (dense, width)
        yield "mlp.down_proj.weight", (width, dense)
        return
    experts = config["num_local_experts" if family == "mixtral" else "num_experts"]
    hidden = config["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"]
    block, gate, up, down = _GATE_UP_DOWN[family]
    if layout == "fused":
        yield "mlp.gate.weight", (experts, width)
        yield "mlp.experts.gate_up_proj", (experts, 2 * hidden, width)
        yield "mlp.experts.down_proj", (experts, width, hidden)
        return
    yield f"{block}.gate.weight", (experts, width)
    for expert in range(experts):
        yield f"{block}.experts.{expert}.{gate}.weight", (hidden, width)
        yield f"{block}.experts.{expert}.{up}.weight", (hidden, width)
        yield f"{block}.experts.{expert}.{down}.weight", (width, hidden)


def random_tensors(
    config: Mapping[str, Any], dtype: str = "float32", layout: Layout = "experts", seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint, norm scales about 1; a seed gives both layouts the same values."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in tensor_shapes(config):
        noise = 0.2 * rng.standard_normal(shape)
        values[name] = (1 + noise if "norm" in name else noise).astype(DTYPES[dtype])
    if layout == "experts":
        return values
    block, gate, up, down = _GATE_UP_DOWN[config["model_type"]]
    fused = {}
    for name, shape in tensor_shapes(config, "fused"):
        stem = name.partition("mlp.")[0] + block
        if name.endswith("mlp.experts.gate_up_proj"):
            pairs = [
                [values[f"{stem}.experts.{e}.{word}.weight"] for word in (gate, up)] for e in range(shape[0])
            ]
            fused[name] = np.stack([np.concatenate(pair) for pair in pairs])
        elif name.endswith("mlp.experts.down_proj"):
            fused[name] = np.stack([values[f"{stem}.experts.{e}.{down}.weight"] for e in range(shape[0])])
        else:
            fused[name] = values[f"{stem}.gate.weight" if name.endswith("mlp.gate.weight") else name]
    return fused


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """Write safetensors files: one, or several with an index and neighbouring tensors in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    file_of = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: values for name, values in tensors.items() if file_of[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer.json of whole words ``w3`` … with ``<unk>`` 0, ``<s>`` 1 and ``</s>`` 2, and its config."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_checkpoint(
    folder: str | Path,
    family: str,
    dtype: str = "float32",
    layout: Layout = "experts",
    shards: int = 3,
    seed: int = 0,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Write a whole Hugging Face folder of a tiny random model, without torch.

    Args:
        folder: made if need be.
        family: one of `FAMILIES`.
        dtype: key of `DTYPES`.
        layout: experts one by one, or fused.
        shards: number of safetensors files; 1 writes no index.
        seed: of the weights.
        overrides: config fields.

    Returns:
        The tensors by name.
    """
    folder = Path(folder)
    config = families.config_json(family, overrides) | {"torch_dtype": dtype}
    tensors = random_tensors(config, dtype, layout, seed)
    write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder, config["vocab_size"])
    return tensors
