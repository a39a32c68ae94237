import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import RunConfig, load_config
from jaxmoe.errors import UserError
from jaxmoe.run.folder import RunFolder


def configure(folder, **sections):
    mapping = {
        "model": {"config": {"hidden_size": 32}},
        "data": {"path": "train.jsonl", "sequence_length": 128},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 10, "batch_size": 8},
        "output_dir": str(folder),
    }
    for section, keys in sections.items():
        mapping[section] = mapping.get(section, {}) | keys if isinstance(keys, dict) else keys
    return RunConfig.from_mapping(mapping)


def begin(config):
    """The run with its first step logged."""
    with RunFolder.open(config) as folder:
        folder.append({"step": 1})


@pytest.fixture
def config(tmp_path):
    return configure(tmp_path / "runs" / "x")


def lines(folder):
    return [json.loads(line) for line in folder.layout.metrics.read_text().splitlines()]


def test_a_new_folder_holds_the_configuration_as_resolved(config):
    with RunFolder.open(config) as folder:
        assert not folder.resumed
        assert load_config(folder.path / "config.yaml") == config
        assert sorted(entry.name for entry in folder.path.iterdir()) == [".lock", "config.yaml"]


def test_the_same_run_is_opened_again(config):
    with RunFolder.open(config) as folder:
        folder.append({"step": 1})
    with RunFolder.open(config) as folder:
        assert folder.resumed
        assert lines(folder) == [{"step": 1}]


def test_keys_that_change_no_weight_may_change_and_are_written_down(config, tmp_path):
    begin(config)
    free = {"log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 5, "peak_tflops": 9.0, "export": False}
    changed = configure(
        tmp_path / "runs" / "x",
        train=free,
        data={"eval_tokens": 1000, "max_record_bytes": 2**21},
        sample={"prompt": "Once"},
    )
    with RunFolder.open(changed) as folder:
        assert folder.resumed
        assert load_config(folder.path / "config.yaml") == changed


@pytest.mark.parametrize("then", ["[]", "\n- output_dir: runs/y"])
def test_a_run_of_an_earlier_version_goes_on(config, then):
    begin(config)
    file = Path(config.output_dir) / "config.yaml"
    file.write_text(f"{config.to_yaml()}then: {then}\n".replace("you_jiacheng", "quintic"))
    with RunFolder.open(config) as folder:
        assert folder.resumed
    assert load_config(file) == config  # brought up to date


def test_a_moved_folder_is_still_the_same_run(config, tmp_path):
    begin(config)
    (tmp_path / "runs" / "x").rename(tmp_path / "moved")
    with RunFolder.open(configure(tmp_path / "moved")) as folder:
        assert folder.resumed


def test_another_run_is_refused_with_all_differences_and_left_alone(config, tmp_path):
    begin(config)
    before = (tmp_path / "runs" / "x" / "config.yaml").read_text()
    other = configure(
        tmp_path / "runs" / "x",
        optimizer={"learning_rate": 2e-4, "name": "muon"},
        train={"seed": 3},
        model={"config": {"hidden_size": 64, "layers": 2}},
    )
    with pytest.raises(UserError) as caught:
        RunFolder.open(other)
    message = str(caught.value)
    assert "\n" not in message
    for difference in (
        "holds another run",
        "optimizer.learning_rate is 0.0001 there and 0.0002 here",
        'optimizer.name is "adamw" there and "muon" here',
        "train.seed is 0 there and 3 here",
        "model.config.hidden_size is 32 there and 64 here",
        "model.config.layers is absent there and 2 here",
        "choose another output_dir",
    ):
        assert difference in message
    assert (tmp_path / "runs" / "x" / "config.yaml").read_text() == before
    RunFolder.open(config).close()  # the refusal let go of the lock


@pytest.mark.parametrize("made", ["nothing", "metrics.jsonl", "export", "checkpoints/5", "thesis.tex"])
def test_only_a_start_that_failed_before_training_gives_way_to_another_run(config, tmp_path, made):
    RunFolder.open(config).close()
    path = Path(config.output_dir)
    (path / "tokenizer").mkdir()
    (path / "checkpoints").mkdir()
    if made != "nothing":
        (path / made).mkdir()
    other = configure(path, train={"seed": 3})
    if made == "nothing":
        with RunFolder.open(other) as folder:
            assert not folder.resumed
            assert load_config(path / "config.yaml") == other
            assert not (path / "tokenizer").exists()
    else:
        with pytest.raises(UserError, match=r"train\.seed is 0 there and 3 here"):
            RunFolder.open(other)
        assert load_config(path / "config.yaml") == config
        assert (path / "tokenizer").exists()


def test_a_configuration_that_the_user_put_there_is_not_replaced(config):
    path = Path(config.output_dir)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match="holds another run"):
        RunFolder.open(configure(path, train={"seed": 3}))
    assert load_config(path / "config.yaml") == config


def test_more_steps_for_a_finished_run(config):
    begin(config)
    longer = configure(config.output_dir, train={"steps": 20})
    with pytest.raises(UserError) as caught:
        RunFolder.open(longer)
    assert "train further" not in str(caught.value)
    (Path(config.output_dir) / "export").mkdir()
    with pytest.raises(UserError, match="; to train further, start a new run with model.path=.*/x/export$"):
        RunFolder.open(longer)


def test_a_folder_of_something_else_is_refused_and_left_alone(config):
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"found a folder with 'thesis\.tex' in it but no config\.yaml"):
        RunFolder.open(config)
    assert list(folder.iterdir()) == [folder / "thesis.tex"]


def test_what_a_run_killed_at_its_start_leaves_is_taken_over(config):
    Path(config.output_dir).mkdir(parents=True)
    for name in (".lock", "config.yaml.partial"):
        (Path(config.output_dir) / name).write_text("half")
    with RunFolder.open(config) as folder:
        assert not folder.resumed
        assert load_config(folder.path / "config.yaml") == config


def test_a_file_in_the_way_and_a_broken_configuration(config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="found a file, expected a folder"):
        RunFolder.open(configure(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        RunFolder.open(configure(tmp_path / "file" / "below"))
    begin(config)
    (tmp_path / "runs" / "x" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML in line 1"):
        RunFolder.open(config)


def test_a_second_opening_is_refused_until_the_first_closes(config):
    with RunFolder.open(config):
        with pytest.raises(UserError) as caught:
            RunFolder.open(config)
        assert f"in use by process {os.getpid()} on " in str(caught.value)
        assert "\n" not in str(caught.value)
    RunFolder.open(config).close()


def test_the_lock_ends_with_its_process_even_by_kill_9(config, tmp_path):
    program = """
        import sys, time
        from jaxmoe.config import load_config
        from jaxmoe.run.folder import RunFolder
        folder = RunFolder.open(load_config(sys.argv[1]))
        folder.append({"step": 1})
        print("open", flush=True)
        time.sleep(60)
    """
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), path], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid} on "):
            RunFolder.open(config)
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunFolder.open(config) as folder:
        assert folder.resumed


def test_records_are_valid_json_whatever_the_numbers(config):
    with RunFolder.open(config) as folder:
        folder.append(
            {
                "step": 3,
                "loss": jnp.float32(1.5),
                "half": jnp.bfloat16(0.5),
                "norm": math.nan,
                "range": [math.inf, -math.inf],
                "load": np.arange(3),
                "nested": {"nan": jnp.array([1.0, jnp.nan])},
                "text": "ü",
                "none": None,
            }
        )
        text = folder.layout.metrics.read_text()
        strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert strict == {
            "step": 3,
            "loss": 1.5,
            "half": 0.5,
            "norm": "nan",
            "range": ["inf", "-inf"],
            "load": [0, 1, 2],
            "nested": {"nan": [1.0, "nan"]},
            "text": "ü",
            "none": None,
        }
        assert math.isnan(float(strict["norm"]))
        assert text.endswith("\n")


def test_records_need_a_step_and_plain_values(config):
    with RunFolder.open(config) as folder:
        with pytest.raises(ValueError, match="needs an integer step, found None"):
            folder.append({"loss": 1.0})
        with pytest.raises(ValueError, match="found object"):
            folder.append({"step": 1, "loss": object()})
        assert not folder.layout.metrics.exists()


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 9}', "\x00\x00", "{}\n"])
def test_resuming_forgets_later_steps_and_a_half_written_line(config, tail):
    with RunFolder.open(config) as folder:
        for step in (1, 2, 3, 4, 5):
            folder.append({"step": step, "text": "a b"})
        with folder.layout.metrics.open("a") as file:
            file.write(tail)
        folder.truncate_metrics(3)
        assert [record["step"] for record in lines(folder)] == [1, 2, 3]
        folder.append({"step": 4})
        assert [record["step"] for record in lines(folder)] == [1, 2, 3, 4]
        folder.truncate_metrics(0)
        assert lines(folder) == []
        assert sorted(entry.name for entry in folder.path.iterdir()) == [
            ".lock",
            "config.yaml",
            "metrics.jsonl",
        ]


def test_truncating_nothing_is_fine_and_a_record_without_its_line_break_is_whole(config):
    with RunFolder.open(config) as folder:
        folder.truncate_metrics(3)
        assert not folder.layout.metrics.exists()
        folder.layout.metrics.write_text('{"step": 1}\n{"step": 2}')  # cut off right before the line break
        folder.truncate_metrics(5)
        folder.append({"step": 3})
        assert [record["step"] for record in lines(folder)] == [1, 2, 3]


def test_metrics_that_are_a_folder(config):
    with RunFolder.open(config) as folder:
        folder.layout.metrics.mkdir()
        with pytest.raises(
            UserError, match=r"metrics\.jsonl: cannot read: Is a directory; expected the file"
        ):
            folder.truncate_metrics(0)


def test_a_damaged_line_in_the_middle_is_named(config):
    with RunFolder.open(config) as folder:
        folder.layout.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no record of metrics"):
            folder.truncate_metrics(5)


def test_a_full_disk_is_told_in_one_line(config, tmp_path):
    program = """
        import resource, sys
        from jaxmoe.config import load_config
        from jaxmoe.errors import UserError
        from jaxmoe.run.folder import RunFolder
        folder = RunFolder.open(load_config(sys.argv[1]))
        folder.append({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
        try:
            folder.append({"step": 2, "text": "x" * 100})
        except UserError as error:
            print(error)
        folder.truncate_metrics(1)
        folder.append({"step": 2})
    """
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), path], capture_output=True, text=True
    )
    assert (
        done.stdout
        == f"{config.output_dir}/metrics.jsonl: cannot write: File too large; free some space or choose "
        "another folder\n"
    )
    with RunFolder.open(config) as folder:
        assert lines(folder) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(UserError, match=f"{name}: found no regular file"):
        begin(configure(tmp_path / "out"))
