"""The recipes under configs/: valid, on a mesh that divides their models and has the memory for them."""

import math
import re
from importlib import resources

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxmoe.config import load_config
from jaxmoe.interop.source import config_source
from jaxmoe.kernels.devices import Device
from jaxmoe.parallel.sharding import MESH_AXES
from jaxmoe.params import count
from jaxmoe.run.assemble import assemble

RECIPES = sorted(
    (file for file in resources.files("jaxmoe.configs").iterdir() if file.name.endswith(".yaml")),
    key=lambda file: file.name,
)
HUB_RECIPES = [file for file in RECIPES if not file.name.startswith("quickstart")]

H200 = Device("NVIDIA H200", "gpu", 132, (9, 0), present=False)
H200_BYTES = 141e9
DEVICES_PER_NODE = 8

# What decides sizes in the config.json of each model, and the number of parameters on its hub page.
PUBLISHED = {
    "mistralai/Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen3-30B-A3B-Base": (
        30_532_122_624,
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "allenai/OLMoE-1B-7B-0924": (
        6_919_161_856,
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
}


def by_name(file):
    return file.name


def shard_bytes(tree):
    """Bytes of one device's part of every leaf, each of which has a sharding."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("file", RECIPES, ids=by_name)
def test_is_a_valid_run(file):
    config = load_config(file)
    assert config.output_dir == f"runs/{file.name.removesuffix('.yaml')}"


@pytest.mark.parametrize("file", HUB_RECIPES, ids=by_name)
def test_mesh_divides_the_model_and_holds_it(file):
    config = load_config(file)
    published, raw = PUBLISHED[config.model.path]
    spec = config_source(raw).spec
    assert count(spec.declared) == published
    assert config.data.sequence_length <= raw["max_position_embeddings"]

    sizes = config.mesh.model_dump()
    devices = config.mesh.batch_shards * config.mesh.tensor
    assert devices % DEVICES_PER_NODE == 0
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    # A UserError if the mesh does not divide the model.
    state = assemble(config, mesh, H200, config_source(raw)).state
    # Gradients are float32 like the weights; with micro-batches, their sum is held beside those of one.
    gradients = shard_bytes(state.trainable) * (1 if config.train.accumulation == 1 else 2)
    needed = shard_bytes(state) + gradients
    stated = re.search(r"# State and gradients: (\d+) GB per GPU", file.read_text(encoding="utf-8"))
    assert stated is not None
    assert round(needed / 1e9) == int(stated[1])
    assert needed < 0.55 * H200_BYTES  # jax takes 0.75 by default; activations and gathered weights want 0.2
