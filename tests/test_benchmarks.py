"""What the benchmark of expert layers counts, that its contestants compute the same, and that others run."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.expert_mlp import Activation, expert_mlp
from jaxmoe.kernels.expert_mlp.specs import ExpertLayer, ExpertShape, layer_of

FOLDER = Path(__file__).parent.parent / "benchmarks"
LAYER = ExpertLayer(ExpertShape("tiny", 24, 16, 6, 2), Activation("swiglu_clamped", limit=1.0), bias=True)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import moe_counts
    import moe_layer
    import moe_peers

    yield type("Modules", (), {"counts": moe_counts, "layer": moe_layer, "peers": moe_peers})
    for name in ("common", "moe_counts", "moe_layer", "moe_peers", "moe_torch"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("model", "tokens", "forward", "both"),
    [
        ("Qwen3-30B-A3B", 8192, (0.78, 0.52), (2.35, 1.63)),
        ("Qwen3-30B-A3B", 16384, (1.57, 0.75), (4.70, 2.42)),
        ("Qwen3-30B-A3B", 32768, (3.13, 1.22), (9.40, 4.00)),
        ("Mixtral-8x7B", 8192, (7.31, 1.19), (21.9, 3.8)),
        ("Mixtral-8x7B", 32768, (29.2, 2.78), (87.7, 9.1)),
    ],
)
def test_floors(benchmarks: Any, model: str, tokens: int, forward: Any, both: Any):
    """Milliseconds at 790 TFLOP/s and 4.3 TB/s, worked out by hand elsewhere."""
    line = benchmarks.counts.Line(layer_of(model), tokens, "balanced")
    for backward, (compute, memory) in enumerate((forward, both)):
        assert line.flops("full", bool(backward)) / 790e9 == pytest.approx(compute, rel=0.01)
        assert line.bytes("full", bool(backward)) / 4.3e9 == pytest.approx(memory, rel=0.02)
    rates = {"matmul TFLOP/s": 790.0, "copy GB/s": 4300.0}
    assert line.floor_ms("full", True, rates) == pytest.approx(max(both), rel=0.01)
    frozen = line.flops("lora", True) - 3 * (line.flops("lora", False) - line.flops("full", False))
    assert frozen == pytest.approx(2 / 3 * line.flops("full", True))


def _run(contestant: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(contestant.run(*contestant.arguments))
    return [np.asarray(leaf) for leaf in leaves]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_peers_compute_the_same(benchmarks: Any, weights: str):
    line = benchmarks.counts.Line(LAYER, 30, "half_empty")
    field = benchmarks.layer.Field(line, "float32")
    ours = _run(field.make("ours", weights, True))
    theirs = _run(field.make("ragged_dot", weights, True))
    # out, dx, and the gradients of the router's weights; those of the experts are laid out differently.
    for index in (0, 1, -1):
        np.testing.assert_allclose(ours[index], theirs[index], rtol=1e-4, atol=1e-5)
    norms = [sorted(float(np.linalg.norm(array)) for array in arrays) for arrays in (ours, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_torch_computes_the_same(benchmarks: Any, weights: str):
    import torch

    # No value reaches a clamp: where one does, bfloat16 decides which side the derivative is taken from.
    activation = dataclasses.replace(LAYER.activation, limit=30.0)
    line = benchmarks.counts.Line(dataclasses.replace(LAYER, activation=activation), 30, "zipf")
    field = benchmarks.layer.Field(line, "bfloat16")
    import moe_torch

    layer = moe_torch.make(field.inputs, activation, benchmarks.layer.SCALE, weights, True)
    contestant = field.make("ours", weights, True)
    ours = jax.tree.leaves(contestant.run(*contestant.arguments))
    grads = layer()
    pairs = [(ours[0], layer.forward()), (ours[1], grads[0]), (ours[-1], grads[1])]
    for mine, torchs in pairs:
        mine = np.asarray(mine.astype(jnp.float32))
        torchs = torchs.detach().to(torch.float32).numpy()
        assert np.linalg.norm(mine - torchs) < 0.02 * np.linalg.norm(mine)
    assert len(grads) == len(ours) - 1


def test_a_contestant_that_fails_is_left_out_with_its_reason(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> Any:
        raise MemoryError("needs 54.0 GB")

    monkeypatch.setattr(benchmarks.peers, "dense_layer", refuse)
    line = benchmarks.counts.Line(dataclasses.replace(LAYER, bias=False), 20, "balanced")
    rates = {"matmul TFLOP/s": 1.0, "copy GB/s": 1.0}
    rows = benchmarks.layer.measure_line(line, "float32", rates, 0.0)
    assert [row["pass"] for row in rows] == ["fwd", "fwd+bwd"] * 2
    assert all(row["left out"] == {"dense": "MemoryError: needs 54.0 GB"} for row in rows)
    assert all(row["ms"] > 0 and row["x ragged_dot"] > 0 for row in rows)
    assert benchmarks.layer.summary(rows)[3]["over full"] == rows[3]["ms"] / rows[1]["ms"]


def test_targets(benchmarks: Any):
    row = {"model": "Qwen3-30B-A3B", "tokens": 8192, "routing": "balanced", "weights": "full", "pass": "fwd"}
    row |= {"ms": 2.0, "TFLOP/s": 350.0, "peers ms": {"tokamax mosaic": 2.4, "tokamax triton": 3.0}}
    table = benchmarks.counts.targets_table(benchmarks.counts.GPU_TARGETS, [row])
    assert [line[""] for line in table] == ["reached", *["not measured"] * 5, "missed", "not measured"]


def test_lines_of_a_gpu(benchmarks: Any):
    lines = benchmarks.layer.lines_to_measure(on_cpu=False, quick=False)
    assert len(lines) == len(set(lines)) == 6 * 3 * 3
    assert lines[0] == benchmarks.counts.Line(layer_of("Qwen3-30B-A3B"), 8192, "balanced")


def test_ours_is_what_the_model_calls(benchmarks: Any):
    field = benchmarks.layer.Field(benchmarks.counts.Line(LAYER, 30, "balanced"), "float32")
    inputs = field.inputs
    out = _run(field.make("ours", "lora", False))[0]
    right = expert_mlp(
        inputs.x,
        inputs.experts,
        inputs.chosen,
        inputs.weights,
        activation=LAYER.activation,
        lora_scale=benchmarks.layer.SCALE,
        backend="reference",
    )
    np.testing.assert_allclose(out, np.asarray(right), rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_memory_of_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every input is made and read to its end; the figures are those of a process of its own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import data_memory

    monkeypatch.setattr(data_memory, "MB", 10_000)
    monkeypatch.setattr(data_memory, "EVAL_TOKENS", 1000)
    for number, make in enumerate(data_memory.INPUTS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder, 300_000)
        found = data_memory.measure(str(folder), train_tokenizer=False)
        assert ("refused" in found) == (make is data_memory.one_line), found
        assert found["peak beyond MB"] < 500
    for name in ("common", "data_memory"):
        sys.modules.pop(name, None)


@pytest.mark.torch
@pytest.mark.once
def test_parts_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """A tiny model's parts are all there, for both, and the floors are below them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device
    import step_parts

    found = step_parts.measure("tiny", 1, step_parts.TINY_LENGTH, 1)
    assert set(found["parts"]) == {*step_parts.COUNTED, *step_parts.INSIDE, step_parts.WHOLE} - set(
        step_parts.LEFT
    )
    rows = {row["part"]: row for row in step_parts.table(found)}
    assert rows["experts"]["a step"] == 2
    parts = sum(rows[part]["ms"] * rows[part]["a step"] for part in [*step_parts.COUNTED, step_parts.REST])
    assert parts == pytest.approx(rows[step_parts.WHOLE]["ms"])
    assert sum(rows[part]["share %"] for part in [*step_parts.COUNTED, step_parts.REST]) == pytest.approx(100)
    assert all(rows[part]["torch ms"] > 0 for part in step_parts.COUNTED)
    for name in ("common", "parts_counts", "parts_ours", "parts_torch", "step_parts", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.torch
@pytest.mark.once
def test_steps_of_adapters(monkeypatch: pytest.MonkeyPatch):
    """PEFT and we compute the same loss after a step, from a base that QLoRA rounds."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import lora_step

    size = {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "num_experts": 4}
    rows = lora_step.measure("tiny", size | {"top_k": 2, "batch": 2}, 16, 1, 4)
    losses = {row["contestant"].removesuffix(" (the peer)"): row["loss_of_step_2"] for row in rows}
    ours = losses["jaxmoe, LoRA"]
    for experts in ("eager", "grouped_mm"):
        # Both draw an A of their own, which the first update of B goes through.
        assert losses[f"transformers and PEFT, {experts}"] == pytest.approx(ours, rel=1e-3)
    assert losses["jaxmoe, full"] < ours
    assert losses["jaxmoe, QLoRA"] == pytest.approx(ours, rel=0.01)
    assert losses["jaxmoe, QLoRA"] != ours
    assert sum("(the peer)" in row["contestant"] for row in rows) == 1
    (aim,) = lora_step.aims(rows)
    assert aim["over_full"] == rows[1]["median_s"] / rows[0]["median_s"]
    for name in ("common", "lora_step", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.once
def test_memory_of_qlora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A run reads, quantises and takes its steps; the figures are those of a process of its own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import checkpoint_memory
    import qlora_memory

    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 64}
    sizes |= {"num_experts": 4, "num_attention_heads": 4}
    monkeypatch.setattr(checkpoint_memory, "CONFIG", checkpoint_memory.CONFIG | sizes)
    checkpoint_memory.make_checkpoint(tmp_path, True, 10**6)
    found = qlora_memory.measure(str(tmp_path), "nf4", 2, 32)
    assert 0 < found["state"] < found["plan"]
    assert np.isfinite(found["loss"])
    line = qlora_memory.row("nf4", 2, 32, found | {"plan": 1e8, "steps": 1.11e8})
    assert (line["tokens"], line["within 10 %"]) == (64, False)
    for name in ("checkpoint_memory", "common", "data_memory", "qlora_memory"):
        sys.modules.pop(name, None)


@pytest.mark.once
def test_floors_of_parts(monkeypatch: pytest.MonkeyPatch):
    """FLOPs of a dense step: six for every weight that a token meets, but for the embedding; and attention's."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import parts_counts

    shape = parts_counts.Shape(3, 50, 24, 5, 16, 6, 2, 70, heads=4, kv_heads=2, head_dim=7, parameters=1)
    met = 5 * (24 * 7 * (4 + 2) * 2 + 24 * 6 + 2 * 3 * 24 * 16) + 70 * 24
    mixing = 5 * (2 + 5) * 2 * 4 * 7 * 51 / 2
    floor = parts_counts.whole_floor_ms(shape, {"matmul TFLOP/s": 1e-9, "copy GB/s": 1e-6})
    assert floor["flops"] == pytest.approx(3 * 50 * (6 * met + mixing))
    sys.modules.pop("parts_counts", None)


@pytest.mark.once
def test_generation(monkeypatch: pytest.MonkeyPatch):
    """Both ways find the same tokens."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import generation

    sizes = {"vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 2, "moe_intermediate_size": 20}
    sizes |= {"num_attention_heads": 4, "head_dim": 6, "num_experts": 7, "num_experts_per_tok": 3}
    row = generation.measure(generation.CONFIG | sizes, 30, "float32", 1, 5)
    assert row["first_tokens_agree"]
    assert row["faster_by"] == pytest.approx(row["cached_tokens_per_s"] / row["whole_tokens_per_s"])
    for name in ("common", "generation"):
        sys.modules.pop(name, None)
