"""Configurations of small runs, and the train command in a process of its own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import tiny
from jaxmoe.cli import main as cli
from jaxmoe.run import loop


def write_workspace(folder: Path) -> Path:
    """A checkpoint of a tiny Qwen3-MoE in two files, and text for its tokenizer of words w3 … w103."""
    tiny.write_checkpoint(folder / "model", "qwen3_moe", dtype="bfloat16", shards=2, initializer_range=0.02)
    rng = random.Random(0)
    (folder / "text").mkdir()
    for part in range(3):
        lines = [
            " ".join(f"w{3 + int(rng.triangular(0, 100, 9))}" for _ in range(rng.randint(5, 60)))
            for _ in range(40)
        ]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / "text" / f"part{part}.jsonl").write_text(text)
    return folder


def run_config(workspace: Path, output: Path, **changes) -> dict:
    config = {
        "model": {"path": str(workspace / "model"), "dtype": "float32"},
        "data": {"path": str(workspace / "text"), "sequence_length": 24, "eval_fraction": 0.1},
        "optimizer": {"name": "muon", "learning_rate": 0.003, "warmup_steps": 2},
        "balance": {"aux_loss": 0.01},
        "train": {
            "steps": 12,
            "batch_size": 8,
            "micro_batch_size": 4,
            "checkpoint_every": 3,
            "log_every": 1,
            "eval_every": 4,
            "peak_tflops": 1.0,
        },
        "output_dir": str(output),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config.setdefault(section, {})[name] = value
        else:
            config[section] = value
    return config


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def small(folder: Path, workspace: Path, **changes) -> Path:
    """The config file of a run of two steps on the eight devices of this process."""
    given = {"mesh": {"data": 8}, "train__micro_batch_size": 8, "train__steps": 2, "train__export": False}
    return write_config(folder, run_config(workspace, folder / "run", **(given | changes)))


# Stands for a full disk: no file may grow past argv[1] bytes.
LIMITED = """
import resource, runpy, signal, sys
limit = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("jaxmoe.train", run_name="__main__")
"""


def start(config: Path, *overrides: str, file_limit: int | None = None) -> subprocess.Popen:
    """The command in a process of its own, on one device."""
    # Optimising takes longer than the code then runs; the runs inside pytest are optimised.
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    program = ["-m", "jaxmoe.train"] if file_limit is None else ["-c", LIMITED, str(file_limit)]
    return subprocess.Popen(
        [sys.executable, *program, str(config), *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=config.parent,
    )


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def refused(config: Path, expected: str, capfd, *overrides: str) -> None:
    """Exit code 2, one line with `expected` in it, no traceback, and no run folder."""
    output = Path(yaml.safe_load(config.read_text())["output_dir"])
    existed = output.exists()
    assert cli(["train", str(config), *overrides]) == 2
    out, err = capfd.readouterr()
    assert err.count("error: ") == 1, err
    assert len(err.strip().splitlines()) == 1, err
    assert expected in err
    assert "Traceback" not in out + err
    assert output.exists() == existed, "nothing is left of a run that did not begin"


def run_until(config, step: int, monkeypatch) -> None:
    """Run until a fault ends the run after the computation of `step`; later runs are not disturbed."""
    report = loop.Trainer._report

    def interrupted(self, number, *rest):
        if number == step:
            raise RuntimeError("interrupted")
        return report(self, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "_report", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            loop.run(config)
