"""What is frozen keeps its bytes, and costs no gradient and no state; the rest trains."""

import json
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.runs import run_config, run_until, small, write_config, write_workspace
from safetensors.numpy import load_file

from jaxmoe.cli import main as cli
from jaxmoe.config import RunConfig
from jaxmoe.interop.selection import select
from jaxmoe.interop.source import open_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import named
from jaxmoe.run import loop
from jaxmoe.run.assemble import assemble
from jaxmoe.run.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("freezing"))


def tensors_of(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


CASES = {
    "router and experts": (
        {"frozen": [r"\.mlp\.gate\.weight$", r"\.experts\."]},
        (".mlp.gate.", ".experts."),
    ),
    "all but attention": (
        {"trainable": ["self_attn"]},
        ("embed", "norm.weight", "mlp", "layernorm", "lm_head"),
    ),
    "the first two layers": ({"frozen": [r"layers\.[01]\."]}, ("layers.0.", "layers.1.")),
}


def is_frozen(case, name):
    return any(part in name for part in CASES[case][1]) and not (
        case == "all but attention" and "self_attn" in name
    )


@pytest.mark.parametrize(("name", "case"), list(zip(("adamw", "muon", "muon"), CASES, strict=True)))
def test_frozen_tensors_keep_their_bytes_and_have_no_state(workspace, tmp_path, case, name):
    changes = CASES[case][0] | {
        "model__dtype": "bfloat16",
        "optimizer__name": name,
        "train__steps": 3,
        "train__eval_every": None,
        "mesh": {"fsdp": 2, "expert": 2, "tensor": 2},
    }
    config = RunConfig.from_mapping(run_config(workspace, tmp_path / "run", **changes))
    loop.run(config)
    before, after = tensors_of(workspace / "model"), tensors_of(tmp_path / "run" / "export")
    assert before.keys() == after.keys()
    for tensor, old in before.items():
        same = (old.view(np.uint16) == after[tensor].view(np.uint16)).all()
        assert same == is_frozen(case, tensor), tensor

    state = assemble(config, make_mesh(fsdp=2, expert=2, tensor=2)).state
    elements = sum(array.size for tensor, array in before.items() if not is_frozen(case, tensor))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trainable)) == elements
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert elements <= moments <= 2 * elements

    saved = Checkpoints(tmp_path / "run" / "checkpoints", None)
    restored, _ = saved.restore(3, state.saved)
    saved.close()
    assert sum(leaf.size for leaf in jax.tree.leaves(restored)) <= 3 * elements + 100


def test_a_frozen_run_resumes_to_the_same_weights(workspace, tmp_path, monkeypatch):
    def config(name):
        changes = {
            "frozen": [r"\.experts\."],
            "train__steps": 5,
            "train__checkpoint_every": 2,
            "train__micro_batch_size": 8,
            "mesh": {"data": 8},
        }
        return RunConfig.from_mapping(run_config(workspace, tmp_path / name, **changes))

    loop.run(config("whole"))
    run_until(config("resumed"), 4, monkeypatch)
    loop.run(config("resumed"))
    one, other = (tensors_of(tmp_path / name / "export") for name in ("whole", "resumed"))
    for tensor, values in one.items():
        np.testing.assert_array_equal(values.view(np.uint16), other[tensor].view(np.uint16), err_msg=tensor)
    # The command that exports a checkpoint reads what is frozen again as well.
    assert cli(["export", str(tmp_path / "whole"), str(tmp_path / "later")]) == 0
    for tensor, values in tensors_of(tmp_path / "later").items():
        np.testing.assert_array_equal(values.view(np.uint16), one[tensor].view(np.uint16), err_msg=tensor)


def test_other_weights_where_the_frozen_ones_were_are_noticed(workspace, tmp_path, capfd):
    shutil.copytree(workspace, tmp_path / "work")
    config = run_config(tmp_path / "work", tmp_path / "run", **ONE_STEP, frozen=[r"\.experts\."])
    assert cli(["train", str(write_config(tmp_path, config))]) == 0
    tiny.write_checkpoint(
        tmp_path / "work" / "model", "qwen3_moe", "bfloat16", shards=2, seed=1, initializer_range=0.02
    )
    assert cli(["export", str(tmp_path / "run"), str(tmp_path / "later")]) == 2
    (*_, line) = capfd.readouterr().err.strip().splitlines()
    assert re.search(
        r"model: the frozen weights have the checksum \d+ here and had \d+ when the run began", line
    )
    assert not (tmp_path / "later").exists()


def test_frozen_weights_cost_no_gradient(workspace, tmp_path):
    """Of all products, those that make the gradients of frozen matrices are gone."""

    def products(**changes):
        raw = run_config(workspace, tmp_path, train__batch_size=2, train__micro_batch_size=2, **changes)
        assembled = assemble(RunConfig.from_mapping(raw), make_mesh(devices=jax.devices()[:1]))
        with jax.set_mesh(assembled.mesh):
            traced = assembled.train_step.trace(assembled.state, assembled.batch)
        found = re.findall(r"f32\[([\d,]+)\] = dot_general", str(traced.jaxpr))
        return Counter(tuple(map(int, shape.split(","))) for shape in found)

    adamw = {"optimizer__name": "adamw"}
    everything, attention = products(**adamw), products(**adamw, trainable=["self_attn"])
    gradients = {
        "q_proj": (64, 40),
        "o_proj": (40, 64),
        "router": (12, 40),
        "dense down": (40, 72),
        "head": (40, 104),  # summed up as (D, V)
    }
    for name in ("q_proj", "o_proj"):
        assert everything[gradients[name]] == attention[gradients[name]] > 0, name
    for name in ("router", "dense down", "head"):
        assert everything[gradients[name]] > attention[gradients[name]] == 0, name


def frozen_of(selection):
    """Names of the parameters that are not trained."""
    names = [name for name, _ in named(selection.source.spec.declared)]
    return [name for name, on in zip(names, jax.tree.leaves(selection.mask), strict=True) if not on]


def test_layers_are_grouped_by_what_is_trained(workspace):
    source = open_source(workspace / "model")
    chosen = select(source, None, [r"layers\.[012]\.self_attn\.q_proj"])
    frozen = frozen_of(chosen)
    assert chosen.source.spec.layers == source.spec.layers
    assert frozen
    assert all(name.endswith("attention.q_proj") for name in frozen)
    names = [part.source for name in frozen for part in chosen.source.bindings.of_parameter[name]]
    assert sorted(names) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    assert select(source, None, []).source is source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"frozen": ["router"]},
            r"frozen: 'router' matches no tensor of the model; its tensors are called model\.",
        ),
        ({"trainable": ["self_atn"]}, r"trainable: 'self_atn' matches no tensor"),
        (
            {"frozen": ["experts.(3|4)."]},
            r"train model.layers.\d.mlp.experts.\d+.* are parts of one parameter",
        ),
        ({"frozen": ["gate_proj"]}, "parts of one parameter"),
        ({"frozen": ["("]}, r"frozen: found '\(', which is no regular expression"),
        ({"frozen": ["."]}, "leave nothing of the model's .* parameters to train"),
        ({"trainable": []}, "leave nothing"),
        ({"frozen": "experts"}, "frozen: found the string 'experts', expected a list"),
    ],
)
def test_patterns_that_are_refused(workspace, tmp_path, capfd, changes, message):
    config = small(tmp_path, workspace, **changes)
    assert cli(["train", str(config)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_tied_head_goes_by_either_name(tmp_path):
    tiny.write_checkpoint(tmp_path / "model", "mixtral", tie_word_embeddings=True)
    source = open_source(tmp_path / "model")
    for pattern in ("embed_tokens", "lm_head"):
        assert frozen_of(select(source, None, [pattern])) == ["embed"]


ONE_STEP = {
    "train__steps": 1,
    "train__micro_batch_size": 8,
    "train__export": False,
    "optimizer__warmup_steps": 0,
    "mesh": {"data": 8},
}


def test_another_choice_is_another_run(workspace, tmp_path, capfd):
    config = run_config(workspace, tmp_path / "run", **ONE_STEP, frozen=["experts"])
    assert cli(["train", str(write_config(tmp_path, config))]) == 0
    assert cli(["train", str(write_config(tmp_path, config | {"frozen": []}))]) == 2
    assert json.dumps(["experts"]) in capfd.readouterr().err
