"""The recipes under configs/: valid, on a mesh that divides their models and has the memory for them."""

import math
import re
from importlib import resources

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxmoe.config import load_config
from jaxmoe.configs import published
from jaxmoe.interop.adapting import adapt
from jaxmoe.interop.source import config_source
from jaxmoe.kernels.devices import Device
from jaxmoe.parallel.sharding import MESH_AXES
from jaxmoe.run.assemble import assemble

RECIPES = sorted(
    (file for file in resources.files("jaxmoe.configs").iterdir() if file.name.endswith(".yaml")),
    key=lambda file: file.name,
)
HUB_RECIPES = [file for file in RECIPES if not file.name.startswith("quickstart")]

H200 = Device("NVIDIA H200", "gpu", 132, (9, 0), present=False)
H200_BYTES = 141e9
DEVICES_PER_NODE = 8

PUBLISHED = {model.hub: model for model in published().values()}


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
    config, text = load_config(file), file.read_text(encoding="utf-8")
    model = PUBLISHED[config.model.path]
    spec = config_source(model.config).spec
    weights = [parameter for parameter in jax.tree.leaves(spec.declared) if parameter.role != "constant"]
    assert sum(parameter.size for parameter in weights) == model.parameters
    assert config.data.sequence_length <= model.config["max_position_embeddings"]

    sizes = config.mesh.model_dump()
    devices = config.mesh.batch_shards * config.mesh.tensor
    assert devices == 1 if config.adapter is not None else devices % DEVICES_PER_NODE == 0
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    # A UserError if the mesh does not divide the model.
    state = assemble(config, mesh, H200, config_source(model.config)).state
    # Gradients are float32 like the weights; with micro-batches, their sum is held beside those of one.
    gradients = shard_bytes(state.trainable) * (1 if config.train.accumulation == 1 else 2)
    needed = shard_bytes(state) + gradients
    stated = re.search(r"# State and gradients: (\d+) GB per GPU", text)
    assert stated is not None
    assert round(needed / 1e9) == int(stated[1])
    budget = re.search(r"on one GPU of (\d+) GB", text)
    if budget is None:
        assert (
            needed < 0.55 * H200_BYTES
        )  # jax takes 0.75 by default; activations and gathered weights want 0.2
        return
    # One device gathers nothing; it unpacks a layer's experts.
    assert needed < 0.85 * 1e9 * int(budget[1])
    planned = re.search(r"included: (\d+) GB \(`make\s+(?:# )?recipes`\)", text)
    assert planned is not None
    assert needed < 1e9 * int(planned[1]) < 1e9 * int(budget[1])


def test_gemma_4_is_adapted_in_its_language_model():
    """Also where the folder has a tower, whose attention has the same names."""
    config = load_config(next(file for file in HUB_RECIPES if file.name.startswith("gemma-4")))
    text = dict(PUBLISHED[config.model.path].config)
    whole = config_source({"model_type": "gemma4", "text_config": text, "vision_config": {}})
    alone = config_source(text)
    names = [adapt(source, config.adapter, config.model.packing).widths for source in (whole, alone)]
    layers = {"model.language_model.layers.", "model.layers."}
    for found, prefix in zip(names, sorted(layers), strict=True):
        assert all(name.startswith(prefix) for name in found)
        kinds = {name.removeprefix(prefix).partition(".")[2] for name in found}
        attention = {f"self_attn.{kind}_proj.weight" for kind in "qkvo"}
        assert kinds == {*attention, "experts.gate_up_proj", "experts.down_proj"}
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert not re.fullmatch(config.adapter.target_modules, tower)
