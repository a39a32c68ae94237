"""The check of the kernels on a device, and the search for tiles; with stand-ins for the device."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.kernels import tune
from jaxmoe.kernels.expert_mlp import xla
from jaxmoe.kernels.expert_mlp.mosaic.layer import Mosaic
from jaxmoe.kernels.expert_mlp.mosaic.tiles import GradientLaunch, MatmulLaunch
from jaxmoe.kernels.expert_mlp.specs import LAYERS, choose_experts, layer_of
from jaxmoe.kernels.expert_mlp.tuning.check import CASES, LIMIT, Case, WrongResults, check
from jaxmoe.kernels.expert_mlp.tuning.measured import measured_on
from jaxmoe.kernels.expert_mlp.tuning.search import launches, search

PLAIN = Case(tokens=33, width=24, hidden=20, held=4, top_k=2, used=2, elsewhere=True)
CASE = dataclasses.replace(PLAIN, bias=True, rank=3)
INTERPRETER_IS_COMPLETE = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)


@dataclasses.dataclass(frozen=True)
class StandIn(Mosaic):
    """The portable backend with a fault."""

    multiprocessors: int = 3
    out: Any = lambda out: out
    grads: Any = lambda grads: grads

    def forward(self, *args: Any, save: bool) -> Any:
        out, saved = xla.forward(*args, save=save)
        return self.out(out), saved

    def backward(self, *args: Any) -> Any:
        return self.grads(xla.backward(*args))


def test_check_of_right_kernels():
    lines: list[str] = []
    cases = [CASE, *(dataclasses.replace(CASE, frozen=True, packed=kind) for kind in ("nf4", "int8"))]
    assert check(StandIn(), cases, repeats=2, say=lines.append) == pytest.approx(1.0, abs=0.01)
    assert "rank 3" in lines[0]
    assert "largest error over the naive one" in lines[1]
    assert "base in int8" in lines[4]


def _with_down(grads: Any, change: Any) -> Any:
    return grads._replace(experts=grads.experts._replace(down=change(grads.experts.down)))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"out": lambda out: out.at[5, 3].set(jnp.nan)}, "out inf"),
        ({"out": lambda out: out.at[5].set(out[6])}, "out "),
        ({"grads": lambda grads: grads._replace(weights=1.05 * grads.weights)}, "gradient of weights"),
        (
            {"grads": lambda grads: _with_down(grads, lambda down: down.at[0, 2, 1].set(1e-6))},
            "gradient of experts.down inf",
        ),
        (
            {"grads": lambda grads: _with_down(grads, lambda down: down[:, :, ::-1])},
            "gradient of experts.down",
        ),
    ],
)
def test_check_names_what_is_wrong(fault: Any, name: str):
    with pytest.raises(WrongResults, match=f"case 1: .*{name}"):
        check(StandIn(**fault), [PLAIN], say=lambda _: None)


def test_check_goes_on_after_a_case_that_does_not_run():
    def refuse(out: jax.Array) -> jax.Array:
        if out.dtype == jnp.float16:
            raise RuntimeError("no such instruction")
        return out

    lines: list[str] = []
    cases = [dataclasses.replace(PLAIN, dtype="float16"), PLAIN]
    with pytest.raises(WrongResults, match=r"case 1 does not run \(RuntimeError\)$"):
        check(StandIn(out=refuse), cases, say=lines.append)
    assert len(lines) == 4


def test_cases_reach_every_way_through_the_kernels():
    assert {case.activation.name for case in CASES} == {"silu", "gelu_tanh", "swiglu_clamped", "relu2"}
    outs = {case.activation.parts * case.hidden for case in CASES} | {case.width for case in CASES}
    gradients = [next(GradientLaunch(out, 64).candidates()).out for out in outs]
    assert set(gradients) == {64, 128, 192}
    assert {case.dtype for case in CASES} == {"bfloat16", "float16"}
    assert {case.packed for case in CASES} == {"", "nf4", "fp4", "int8", "fp8"}
    assert all(case.frozen for case in CASES if case.packed)


def test_search_finds_the_fastest_on_the_way():
    launch = MatmulLaunch(rows=128, columns=768, contraction=2048, parts=2)
    candidates = list(launch.candidates())
    seconds = {
        tiles: float(abs(tiles.columns - 96) + abs(tiles.stages - 4) + (tiles.band != 4))
        for tiles in candidates
    }
    times = search(candidates, seconds.get, lambda: False)
    best = min(times, key=lambda tiles: times[tiles])
    assert (best.columns, best.stages, best.band) == (96, 4, 4)
    assert next(iter(times)) == candidates[0]
    assert len(times) < len(candidates) / 2


def test_search_leaves_out_what_does_not_run_and_ends_in_time():
    candidates = list(GradientLaunch(1536, 2048).candidates())
    assert search(candidates, lambda _: 1.0, lambda: True) == {candidates[0]: 1.0}
    assert search(candidates, lambda _: None, lambda: False) == {}
    times = search(
        candidates, lambda tiles: None if tiles.stages == 4 else float(tiles.columns), lambda: False
    )
    assert min(tiles.stages for tiles in times) > 4


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_launches_of_a_layer(layer: Any):
    found = [recorded.launch for recorded in launches(layer, 8192)]
    shape, parts = layer.shape, layer.activation.parts
    assert len(found) == 6
    assert GradientLaunch(parts * shape.d_hidden, shape.d_model) in found
    assert {launch.kept_parts for launch in found if isinstance(launch, MatmulLaunch)} == {0, parts}


def test_choices_differ_and_leave_experts_out():
    chosen = choose_experts("half_empty", 50, 10, 4)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert set(chosen.ravel().tolist()) == {0, 2, 4, 6, 8}
    with pytest.raises(ValueError, match="top_k is 6; expected at most 5"):
        choose_experts("half_empty", 50, 10, 6)
    shares = sorted((choose_experts("zipf", 999, 10, 1) == expert).mean() for expert in range(10))
    assert shares[-1] > 3 * shares[4]


def test_without_such_a_gpu_the_command_says_so_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert tune.main(["--check"]) == 2
    assert capsys.readouterr().err == (
        "error: the kernels are for NVIDIA Hopper GPUs (H100, H200) and this is cpu: nothing to check or tune\n"
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tune.Machine("NVIDIA H200", StandIn(), [PLAIN], repeats=1, timer=lambda _: 1.0)
    monkeypatch.setattr(tune, "_machine_at_hand", lambda: machine)
    monkeypatch.setattr(tune, "tune_launch", lambda recorded, *_: next(recorded.launch.candidates()))


@pytest.mark.usefixtures("stand_in")
def test_findings_are_written_beside_earlier_ones(tmp_path: Any):
    path = tmp_path / "NVIDIA_H200.json"
    path.write_text(
        json.dumps({"device": "NVIDIA H200", "checked": {"0.1": 1.1}, "tiles": {"old": {"out": 64}}})
    )
    arguments = ["--model", "Qwen3-30B-A3B", "--tokens", "8192", "--output", str(tmp_path)]
    assert tune.main([*arguments, "--check"]) == 0
    content = json.loads(path.read_text())
    assert content["tiles"] == {"old": {"out": 64}}
    assert content["checked"] == {"0.1": 1.1, jax.__version__: pytest.approx(1.0, abs=0.01)}
    measured_on.cache_clear()
    assert tune.main(arguments) == 0
    tiles = json.loads(path.read_text())["tiles"]
    assert len(tiles) == 7
    launch = next(item.launch for item in launches(layer_of("Qwen3-30B-A3B"), 8192))
    assert launch.tiles(tiles) == next(launch.candidates())
    measured_on.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_tiles_alone_need_a_check_before(tmp_path: Any, capsys: pytest.CaptureFixture[str]):
    assert tune.main(["--tiles", "--output", str(tmp_path)]) == 2
    assert "the kernels are not checked: leave out --tiles" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "NVIDIA_H200.json"
    checked = {jax.__version__: 1.25}
    path.write_text(json.dumps({"device": "NVIDIA H200", "checked": checked, "tiles": {}}))
    measured_on.cache_clear()
    arguments = ["--tiles", "--model", "OLMoE-1B-7B", "--tokens", "8192", "--output", str(tmp_path)]
    assert tune.main(arguments) == 0
    content = json.loads(path.read_text())
    assert content["checked"] == checked
    assert len(content["tiles"]) == 6
    measured_on.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_wrong_kernels_are_no_longer_taken_for_right(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "NVIDIA_H200.json"
    checked = {"0.1": 1.1, jax.__version__: 1.0}
    path.write_text(json.dumps({"device": "NVIDIA H200", "checked": checked, "tiles": {}}))
    machine = dataclasses.replace(tune._machine_at_hand(), backend=StandIn(out=lambda out: 1.1 * out))
    monkeypatch.setattr(tune, "_machine_at_hand", lambda: machine)
    assert tune.main(["--output", str(tmp_path)]) == 1
    assert json.loads(path.read_text())["checked"] == {"0.1": 1.1}
    assert "error: kernels are wrong on NVIDIA H200" in capsys.readouterr().err
    measured_on.cache_clear()


@pytest.mark.skipif(
    not INTERPRETER_IS_COMPLETE, reason="the interpreter of jax before 0.11 runs no transposes"
)
def test_rehearsal(tmp_path: Any, capsys: pytest.CaptureFixture[str]):
    assert tune.main(["--rehearse", "--seconds", "0", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "rehearsal.json").read_text())
    assert content["checked"][jax.__version__] < LIMIT
    assert len(content["tiles"]) == 6
    assert "does not run" not in capsys.readouterr().out


def test_tiles_that_compute_something_else_are_not_used(capsys: pytest.CaptureFixture[str]):
    from jaxmoe.kernels.expert_mlp.tuning.search import tune_launch

    layer = layer_of("OLMoE-1B-7B")
    layer = dataclasses.replace(
        layer, shape=dataclasses.replace(layer.shape, d_model=128, d_hidden=128, experts=2)
    )
    layer = dataclasses.replace(layer, shape=dataclasses.replace(layer.shape, top_k=1))
    recorded = launches(layer, 20)[0]

    def rebuild(backend: Mosaic, slots: Any, arrays: Any) -> list[jax.Array]:
        tiles = recorded.launch.tiles(backend.tiles)
        size = 1.5 if tiles.columns == 64 else 1.0
        return [jnp.full((slots.token.shape[0], 128), size)]

    timer = iter([5.0, *([6.0] * 40)])
    best = tune_launch(
        dataclasses.replace(recorded, rebuild=rebuild), layer, 20, Mosaic(2), lambda _: next(timer), 60.0
    )
    assert best == next(recorded.launch.candidates())
    assert "other results than" in capsys.readouterr().out
