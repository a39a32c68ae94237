"""Two real processes on one machine: the same run as in one process, and errors that end alike in both."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import families
import numpy as np
import pytest
import yaml
from helpers.devices import xla_flags
from helpers.runs import run_config, write_config, write_workspace
from safetensors.numpy import load_file

from jaxmoe.errors import UserError
from jaxmoe.parallel import processes

TIMES = {"seconds", "data_seconds", "tokens_per_second", "mfu"}


def environment(devices: int, **more: str) -> dict[str, str]:
    # Most of the time would go into compiling code that runs for milliseconds.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)} | quick | more


def start_two(*commands: list[str]) -> list[subprocess.Popen]:
    """Each command in a process with one device; they find each other by the environment alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                1,
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(process),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, command in enumerate(commands)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; both are ended where one takes too long."""
    try:
        ended = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended, strict=True)]


@pytest.fixture
def run_of(tmp_path):
    """Writes the configuration of a tiny run, and of one that fine-tunes its export; gives the files."""
    draw = random.Random(0)
    lines = [
        " ".join(f"w{int(draw.triangular(0, 100, 9))}" for _ in range(draw.randint(5, 20))) for _ in range(80)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def write(name: str, **train: object) -> tuple[Path, Path]:
        raw = families.config_json(
            "mixtral", vocab_size=320, num_hidden_layers=1, num_local_experts=4, initializer_range=0.02
        )
        config = {
            "model": {"config": raw, "dtype": "float32", "remat": False},
            # One document a row: the processes' rows are together those of one process.
            "data": {
                "path": str(tmp_path / "text.jsonl"),
                "sequence_length": 24,
                "packing": False,
                "eval_fraction": 0.2,
                "tokenizer": {"train_bpe": 300},
            },
            "optimizer": {"learning_rate": 0.003},
            "balance": {"aux_loss": 0.01},
            "mesh": {"fsdp": 2},
            "train": {
                "steps": 5,
                "batch_size": 8,
                "micro_batch_size": 4,
                "checkpoint_every": 1,
                "log_every": 1,
                "peak_tflops": 1.0,
            }
            | train,
            "frozen": [r"\.gate\.weight$"],
            "output_dir": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        config["model"] = config["model"] | {"path": str(tmp_path / name / "export"), "config": None}
        config["data"] = config["data"] | {"tokenizer": None}
        config["frozen"] = []
        config["output_dir"] = str(tmp_path / f"{name}-tuned")
        second = tmp_path / f"{name}-tuned.yaml"
        second.write_text(yaml.safe_dump(config))
        return path, second

    return write


def metrics(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_two_processes_killed_and_resumed_are_one_process(run_of, tmp_path):
    """A tokenizer made for the run, checkpoints, evaluation, the export, and a second run that opens it."""
    for reference in run_of("one"):
        done = subprocess.run(
            [sys.executable, "-m", "jaxmoe.train", str(reference)],
            env=environment(2),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    command, second = (["-m", "jaxmoe.train", str(path)] for path in run_of("two", distributed=True))
    processes = start_two(command, command)
    # The save of the second step waits for that of the first: four more steps are to come when this is there.
    first = tmp_path / "two" / "checkpoints" / "1"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not any(process.poll() is not None for process in processes):
        if first.exists():
            break
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [code for code, _, _ in finish(processes)] == [-signal.SIGKILL] * 2
    assert len(metrics(tmp_path / "two")) < 5

    (code, out, err), (other_code, other_out, other_err) = finish(start_two(command, command))
    assert (code, other_code) == (0, 0), (err, other_err)
    assert "resuming after step" in " ".join(out.split())
    assert "5 steps done" in " ".join(out.split())
    assert "step" not in other_out + other_err, "one process speaks for both"
    assert [code for code, _, _ in finish(start_two(second, second))] == [0, 0]
    for run in ("", "-tuned"):
        expected, found = metrics(tmp_path / f"one{run}"), metrics(tmp_path / f"two{run}")
        assert len(found) == len(expected)
        for theirs, ours in zip(expected, found, strict=True):
            assert ours == {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()}
        expected_export, export = (tmp_path / f"{name}{run}" / "export" for name in ("one", "two"))
        assert sorted(p.name for p in export.iterdir()) == sorted(p.name for p in expected_export.iterdir())
        theirs = load_file(expected_export / "model.safetensors")
        for name, array in load_file(export / "model.safetensors").items():
            np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


# What may go wrong in one process: each line of output is what this process raised, or got.
DISAGREEMENTS = """
    import json, shutil, sys, types
    from pathlib import Path

    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmoe.parallel import processes
    from jaxmoe.run.checkpoints import Checkpoints
    from jaxmoe.config import load_config
    from jaxmoe.errors import UserError
    from jaxmoe.run.folder import RunFolder
    from jaxmoe.run.model import export_model, open_model

    def told(action):
        try:
            print(json.dumps(action()), flush=True)
        except Exception as error:
            print(json.dumps([type(error).__name__, str(error)]), flush=True)

    def fail(kind, *processes):
        if jax.process_index() in processes:
            raise kind(f"it was {jax.process_index()}")
        return "well"

    processes.join()
    here, config = Path(sys.argv[1]), load_config(Path(sys.argv[2]))
    me = jax.process_index()
    told(lambda: processes.agree(lambda: fail(UserError)))
    told(lambda: processes.agree(lambda: fail(UserError, 1)))
    told(lambda: processes.agree(lambda: fail(UserError, 0, 1)))
    told(lambda: processes.agree(lambda: fail(OSError, 0)))
    told(lambda: processes.agree(lambda: fail((OSError, UserError)[me], 0, 1)))
    told(lambda: processes.first(lambda: f"process {me}"))
    told(lambda: processes.first(lambda: fail(UserError, 0)))
    told(lambda: processes.gather((None, "bcdefgh")[me]))

    folder = RunFolder.open(config)
    told(lambda: RunFolder.open(config).resumed)  # locked by process 0
    folder.append({"step": 1})
    told(lambda: processes.first(folder.layout.metrics.read_text))  # of process 0 alone
    folder.layout.metrics.write_text("nonsense\\n{}\\n") if me == 0 else None
    told(lambda: folder.truncate_metrics(1))
    processes.first(lambda: (folder.layout.metrics.unlink(), folder.layout.metrics.mkdir())[1])
    told(lambda: folder.append({"step": 2}))
    folder.close()

    # Half of the state is in each process; process 1 sees an empty folder, and a disk with room for its half.
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = {"w": jax.device_put(jnp.arange(1000.0), NamedSharding(mesh, PartitionSpec("x")))}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(here / "checkpoints", 2)
    checkpoints.save(1, state, {})
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: types.SimpleNamespace(free=(10**9, 3_999)[me])
    told(lambda: checkpoints.save(2, state, {}))
    shutil.disk_usage = usage
    checkpoints.save(3, state, {})
    checkpoints.close()
    elsewhere = Checkpoints(here / ("checkpoints", "nothing")[me], 2)
    told(elsewhere.latest)
    told(lambda: elsewhere.restore(3, abstract))
    elsewhere.close()

    model = open_model(config.model)
    with jax.set_mesh(jax.make_mesh((1, 2, 1, 1), ("data", "fsdp", "expert", "tensor"))) as _:
        told(lambda: export_model(model, {}, here, dtype="float32", tokenizer_files={}))
"""


@pytest.mark.once
def test_two_processes_train_an_adapter_on_a_packed_base(tmp_path):
    """Each reads and quantises what its devices hold; the adapter and the merged model are those of one process."""
    workspace = write_workspace(tmp_path)
    lora = {
        "rank": 3,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj"],
        "init": "gaussian",
    }
    model = {"path": str(workspace / "model"), "dtype": "float32", "quantization": "nf4"}
    common = {
        "model": model,
        "adapter": lora,
        "mesh": {"expert": 2},
        "data__packing": False,
        "data__eval_fraction": 0.0,
    }
    common |= {"train__steps": 2, "train__eval_every": None, "train__export": "both"}
    for name, more in (("one", {}), ("two", {"train__distributed": True})):
        path = write_config(
            tmp_path / f"{name}.config", run_config(workspace, tmp_path / name, **common, **more)
        )
        command = ["-m", "jaxmoe.train", str(path)]
        if name == "two":
            found = finish(start_two(command, command))
            assert [code for code, _, _ in found] == [0, 0], found
        else:
            subprocess.run([sys.executable, *command], env=environment(2), check=True, capture_output=True)
    for file in ("export/adapter_model.safetensors", "merged/model-00001-of-00002.safetensors"):
        theirs, ours = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            difference = np.abs(np.float32(ours[key]) - np.float32(array)).max()
            assert difference <= 0.01 * np.abs(np.float32(array)).max(), (file, key)
    recorded = [
        (tmp_path / name / "export" / "base_quantization.json").read_bytes() for name in ("one", "two")
    ]
    assert recorded[0] == recorded[1]


def test_what_one_process_finds_wrong_ends_both_alike(run_of, tmp_path):
    script = tmp_path / "disagreements.py"
    script.write_text(textwrap.dedent(DISAGREEMENTS))
    command = [str(script), str(tmp_path), str(run_of("run")[0])]
    ends = finish(start_two(command, command))
    assert [code for code, _, _ in ends] == [0, 0], ends
    ours, theirs = ([json.loads(x) for x in out.splitlines() if "Gloo" not in x] for _, out, _ in ends)
    lock, damaged, directory, room, shared, occupied = (ours[i] for i in (8, 10, 11, 12, 14, 15))
    assert ours[:8] == [
        "well",
        ["UserError", "it was 1"],
        ["UserError", "it was 0"],
        ["OSError", "it was 0"],
        ["UserError", "it was 1"],
        "process 0",
        ["UserError", "it was 0"],
        [None, "bcdefgh"],
    ]
    assert theirs[3] == ["RuntimeError", "another process failed: process 0: OSError: it was 0"]
    assert theirs[:3] + theirs[4:] == ours[:3] + ours[4:]
    assert ours[9] == '{"step": 1}\n'
    assert ours[13] == 3
    for failure, words in {
        "lock": (lock, "in use by process"),
        "damaged": (damaged, "line 1 is no record of metrics"),
        "directory": (directory, "metrics.jsonl: cannot write: Is a directory"),
        "room": (room, "step 2: No space left on device (4,000 bytes needed, 3,999 free); the checkpoint of"),
        "shared": (shared, "process 1 has no such folder where process 0 has a checkpoint"),
        "occupied": (occupied, "is not empty, expected a new or empty folder"),
    }.values():
        assert failure[0] == "UserError"
        assert words in failure[1]


def test_the_command_ends_with_one_line_in_both(run_of):
    """Only the second process does not find the data."""
    command = ["-m", "jaxmoe.train", str(run_of("run", distributed=True)[0])]
    ends = finish(start_two(command, [*command, "data.path=/no/such/text"]))
    for code, _, err in ends:
        assert code == 2
        assert [line for line in err.splitlines() if "/no/such/text" in line] == err.splitlines()[-1:]
        assert err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in err


def test_one_process_only_calls():
    assert processes.agree(lambda: 3) == processes.first(lambda: 3) == 3
    assert processes.gather({"a": None}) == [{"a": None}]
    with pytest.raises(OSError, match="as it is"):
        processes.agree(lambda: (_ for _ in ()).throw(OSError("as it is")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "found no cluster to join"),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID = 'one': expected a number"),
    ],
)
def test_no_cluster(given, expected, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        processes.join()


@pytest.mark.once
def test_conversations_are_prepared_once_for_two_processes_which_resume(tmp_path):
    """Unpacked rows of both processes are together those of one; a killed run goes on bit for bit."""
    draw = random.Random(0)
    words = ["apples", "pears", "plums", "cherries", "11", "12"]

    def turn(role):
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, 5)))}

    rows = [{"messages": [turn("user"), turn("assistant")]} for _ in range(64)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = families.config_json(
        "mixtral", vocab_size=320, num_hidden_layers=1, num_local_experts=4, initializer_range=0.02
    )

    def config(name, **train):
        given = {
            "model": {"config": raw, "dtype": "float32", "remat": False},
            "data": {
                **{"path": str(tmp_path / "chats.jsonl"), "sequence_length": 32, "packing": False},
                **{"chat_template": "chatml", "cache": str(tmp_path / "cache"), "eval_fraction": 0.2},
                "tokenizer": {
                    "train_bpe": 300,
                    "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                },
            },
            "optimizer": {"learning_rate": 0.003},
            "mesh": {"fsdp": 2},
            "train": {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "peak_tflops": 1.0},
            "output_dir": str(tmp_path / name),
        }
        given["train"] |= train
        return write_config(tmp_path / f"{name}-config", given)

    whole = ["-m", "jaxmoe.train", str(config("whole")), "train.distributed=true"]
    for code, out, err in finish(start_two(whole, whole)):
        assert code == 0, out + err
    assert len(list((tmp_path / "cache" / "prepared").glob("*/about.json"))) == 1
    part = config("part")
    both = start_two(*[["-m", "jaxmoe.train", str(part), "train.distributed=true"]] * 2)
    for line in both[0].stdout:
        if line.startswith("step 4/"):
            break
    for process in both:
        process.kill()
        process.communicate()
    again = ["-m", "jaxmoe.train", str(part), "train.distributed=true"]
    for code, out, err in finish(start_two(again, again)):
        assert code == 0, out + err
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert any("eval/loss" in record for record in metrics(tmp_path / "whole"))
