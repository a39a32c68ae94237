"""What the attacks start from: a tiny model, its tokenizer, text, and a run that takes seconds."""

import json
from pathlib import Path

import yaml
from helpers.runs import write_workspace

STEPS = 12


def write(folder: Path) -> Path:
    """``model/`` (a tiny Qwen3-MoE in two files), ``text/`` and ``run.yaml``, which trains the one on the other."""
    folder.mkdir()
    write_workspace(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(config()))
    return folder


def config() -> dict:
    """Paths are relative to the folder."""
    return {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"path": "text", "sequence_length": 24, "eval_fraction": 0.1},
        "optimizer": {"name": "adamw", "learning_rate": 0.003},
        "balance": {"aux_loss": 0.01},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "checkpoint_every": 1,
            "eval_every": 6,
            "log_every": 1,
            "peak_tflops": 1.0,
        },
        "output_dir": "out",
    }


def result(output: Path) -> dict[str, object]:
    """All that a run leaves: its metrics but for times, and the bytes of its export."""
    times = {"seconds", "data_seconds", "tokens_per_second", "mfu"}
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    left: dict[str, object] = {
        "metrics": [{k: v for k, v in line.items() if k not in times} for line in lines]
    }
    for file in sorted((output / "export").iterdir()):
        left[file.name] = file.read_bytes()
    return left
