"""What a step is known to need before it is compiled, what there is, and what is said of it."""

from pathlib import Path

import jax
import pytest

from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError
from jaxmoe.parallel.sharding import make_mesh
from jaxmoe.run import memory
from jaxmoe.run.assemble import assemble

MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}


def assembled(balance=0.0, **changes):
    mapping = {
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {"path": "text", "sequence_length": 4096, "tokenizer": {"train_bpe": 300}},
        "optimizer": {"learning_rate": 1e-3},
        "balance": {"aux_loss": balance},
        "train": {"steps": 1, "batch_size": 16, "micro_batch_size": 8},
        "output_dir": "out",
    }
    config = RunConfig.from_mapping(mapping | changes)
    return assemble(config, make_mesh(devices=jax.devices()[:1]))


LAYERS_INPUTS = 7 * 8 * 4096 * 32 * 4  # layers, rows, tokens, width, bytes


def test_what_every_step_needs(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: LAYERS_INPUTS)
    with pytest.raises(
        UserError, match=r"needs at least .* \(.*29\.4 MB for the layers' inputs\), found 29\.4 MB free"
    ):
        memory.check_before_compiling(assembled())
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * LAYERS_INPUTS)
    memory.check_before_compiling(assembled())
    monkeypatch.setattr(memory, "free_bytes", lambda _: None)
    memory.check_before_compiling(assembled())


def test_inputs_of_layers_are_not_counted_where_the_backward_pass_may_end_before_them(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: LAYERS_INPUTS)
    memory.check_before_compiling(assembled(trainable=["lm_head"]))


def test_a_micro_batch_changes_results_where_the_balance_is_its_own():
    assert memory.remedy(assembled()).startswith(
        "lower train.micro_batch_size (now 8, which changes no result)"
    )
    told = memory.remedy(assembled(balance=0.01), begun=True)
    assert told.startswith("lower train.micro_batch_size (now 8) or")
    assert told.endswith("lower data.sequence_length (now 4096), in a new output_dir")


def test_limits_of_the_cgroups_around_a_process(tmp_path, monkeypatch):
    place = tmp_path / "slurm" / "job"
    place.mkdir(parents=True)
    for folder, limit, used in (
        (place, "9000", 500),
        (tmp_path / "slurm", "7000", 100),
        (tmp_path, "max", 1),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 30\n")
    read = Path.read_text

    def read_text(path, **options):
        return "1:name=x:/y\n0::/slurm/job\n" if str(path) == "/proc/self/cgroup" else read(path, **options)

    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory._cgroup_bytes() == [8530, 6930]
