"""The training step is compiled beside what else a run begins with, and holds nothing up that ends the run."""

import os
import signal
import threading

import jax
import pytest
from helpers.runs import small, write_workspace

from jaxmoe.cli import main as cli
from jaxmoe.interop.source import config_source
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.params import dtypes
from jaxmoe.run.assemble import Assembled
from jaxmoe.run.text_data import TextData
from jaxmoe.run.weights import InitialWeights


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("programs"))


class Fault(Exception):
    """Nobody expects it."""


@pytest.fixture
def compiling(monkeypatch):
    """Compilation that goes on until the test ends; what it gives is set as soon as it has begun."""
    begun, ends = threading.Event(), threading.Event()

    def lower(_):
        begun.set()
        ends.wait(60)
        raise Fault

    monkeypatch.setattr(Assembled, "lower", lower)
    yield begun
    ends.set()


def test_data_is_read_while_the_step_compiles(workspace, tmp_path, compiling, capfd):
    """And a mistake in it is told without waiting."""
    config = small(tmp_path, workspace, data__tokenizer=str(tmp_path / "nothing.json"))
    assert cli(["train", str(config)]) == 2
    assert compiling.is_set()
    assert "nothing.json" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interrupt_does_not_wait_for_the_compiler(workspace, tmp_path, compiling, monkeypatch, capfd):
    asked = TextData.training_batches

    def last_of_the_data(data):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        return asked(data)

    monkeypatch.setattr(TextData, "training_batches", last_of_the_data)
    assert cli(["train", str(small(tmp_path, workspace))]) == 130
    assert compiling.is_set()
    assert capfd.readouterr().err == "interrupted\n"


def test_what_compiling_raises_ends_the_run(workspace, tmp_path, monkeypatch):
    def fail(_):
        raise Fault

    monkeypatch.setattr(Assembled, "lower", fail)
    with pytest.raises(Fault):
        cli(["train", str(small(tmp_path, workspace))])


def test_a_finished_run_compiles_no_step(workspace, tmp_path, monkeypatch, capfd):
    config = str(small(tmp_path, workspace))
    assert cli(["train", config]) == 0
    monkeypatch.setattr(Assembled, "lower", lambda _: pytest.fail("compiled once more"))
    begun = []
    monkeypatch.setattr("jaxmoe.run.programs.Programs.begin", begun.append)
    assert cli(["train", config]) == 0
    assert not begun
    assert "2 steps done" in capfd.readouterr().out


@pytest.mark.parametrize("count", [1, 8])
def test_weights_are_drawn_by_what_was_compiled_before(count, caplog):
    source = config_source(
        {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "num_experts": 8}
    )
    mesh = make_mesh(fsdp=count, devices=jax.devices()[:count])
    weights = InitialWeights(source, dtypes(source.spec.declared, "float32"), mesh, 0)
    with jax.set_mesh(mesh), jax.log_compiles():
        weights.compile()
        assert "draw_all" in caplog.text
        caplog.clear()
        weights.make()
    assert "XLA compilation of jit(draw_all)" not in caplog.text
