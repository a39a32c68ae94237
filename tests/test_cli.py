import json
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings

import pytest
import yaml
from helpers import tiny

from jaxmoe import cli, notices, signals, torchless
from jaxmoe.errors import UserError


@pytest.fixture
def command(monkeypatch):
    """Install a stand-in for the train command; returns the argument lists that it was called with."""
    calls = []

    def install(action):
        module = types.ModuleType("stand_in_for_train")
        module.main = lambda argv: calls.append(argv) or action()
        monkeypatch.setitem(sys.modules, "stand_in_for_train", module)
        monkeypatch.setitem(cli.COMMANDS, "train", "stand_in_for_train")
        return calls

    return install


def fail(error):
    raise error


def test_a_command_gets_the_rest_of_the_line_and_gives_the_exit_code(command):
    calls = command(lambda: 3)
    assert cli.main(["train", "run.yaml", "train.steps=1"]) == 3
    assert calls == [["run.yaml", "train.steps=1"]]


def test_no_exit_code_is_success_and_the_process_line_is_the_default(command, monkeypatch):
    calls = command(lambda: None)
    monkeypatch.setattr(sys, "argv", ["jaxmoe", "train", "--help"])
    assert cli.main() == 0
    assert calls == [["--help"]]


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(command, capsys):
    command(lambda: fail(UserError("train.steps: found 0, expected at least 1")))
    assert cli.main(["train"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: train.steps: found 0, expected at least 1\n"
    assert captured.out == ""


def test_whatever_a_message_quotes_it_stays_one_line(command, capsys):
    command(lambda: fail(UserError("a\nb\x1b[2J\udcff: é 数 'x'\t")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b[2J\\udcff: é 数 'x'\\t\n"


def test_an_interrupt_is_exit_code_130(command, capsys):
    command(lambda: fail(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


def wait(seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return 0


def swallowed_by_a_finalizer():
    Finalized()
    return wait()


def swallowed_by_a_library():
    try:
        signal.raise_signal(signal.SIGTERM)
        wait()
    except:  # noqa: E722
        pass
    return wait()


def turned_into_another_error():
    try:
        signal.raise_signal(signal.SIGTERM)
        wait()
    except BaseException:
        raise RuntimeError("from C++") from None


@pytest.mark.parametrize(
    ("action", "want"),
    [
        (lambda: signal.raise_signal(signal.SIGINT) or wait(), (130, "interrupted\n")),
        (lambda: signal.raise_signal(signal.SIGTERM) or wait(), (143, "terminated\n")),
        (swallowed_by_a_finalizer, (130, "interrupted\n")),
        (swallowed_by_a_library, (143, "terminated\n")),
        (turned_into_another_error, (143, "terminated\n")),
    ],
)
def test_a_signal_ends_the_command_and_then_all_is_as_before(command, capsys, action, want):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    hook = sys.unraisablehook
    command(action)
    assert (cli.main(["train"]), capsys.readouterr().err) == want
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert sys.unraisablehook is hook
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_signal_does_not_disturb_the_cleaning_up_after_it(command):
    cleaned = []

    def action():
        try:
            signal.raise_signal(signal.SIGINT)
            wait()
        finally:
            wait(5 * signals.AGAIN_SECONDS)
            cleaned.append(True)

    command(action)
    assert cli.main(["train"]) == 130
    assert cleaned == [True]


def test_a_signal_in_an_import_waits_for_the_end_of_it(command, monkeypatch, tmp_path):
    source = "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.5)\nwhole = True\n"
    (tmp_path / "interrupted_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def action():
        import interrupted_module  # noqa: F401

        return wait()

    command(action)
    assert cli.main(["train"]) == 130
    assert sys.modules.pop("interrupted_module").whole


def test_signals_that_the_parent_ignores_stay_ignored(command, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command(lambda: signal.raise_signal(signal.SIGINT) or 7)
        assert cli.main(["train"]) == 7
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_signals_are_left_alone(command):
    command(lambda: 7)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["train"])))
    thread.start()
    thread.join()
    assert codes == [7]


def test_refusals_of_argparse_are_mistakes_of_the_user(capsys):
    parser = cli.ArgumentParser(prog="jaxmoe train")
    parser.add_argument("run")
    parser.add_argument("--step", type=int)
    for argv, want in (
        ([], "the following arguments are required: run"),
        (["a", "--step", "x"], "argument --step: invalid int value: 'x'"),
        (["a", "--nope"], "unrecognized arguments: --nope"),
        (["a", "--step"], "argument --step: expected one argument"),
    ):
        with pytest.raises(UserError) as caught:
            parser.parse_args(argv)
        assert str(caught.value) == f"{want}; jaxmoe train --help tells what is expected"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["export", "generate"])
def test_commands_refuse_arguments_in_one_line(name, capsys, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for argv, want in (
        (["--nope", "a", "b"], "unrecognized arguments: --nope"),
        (["a"], {"export": "the following arguments are required: ", "generate": "prompt: found none"}[name]),
        (
            [str(loop), "b"],
            "loop', which is no usable path (Too many levels of symbolic links); give another one",
        ),
        (["a" * 5000, "b"], "which is no usable path (File name too long)"),
        (["~no-such-user/x", "b"], "which is no usable path (Could not determine home directory)"),
    ):
        assert cli.main([name, *argv]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert want in told
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"model": {"path": "my model"}}, "model folder my model does not exist"),
        ({"model": {"config": "my/config.json"}}, "my/config.json"),
        ({"data": {"tokenizer": "words"}}, "data.tokenizer: found no words, which the run used"),
    ],
)
def test_exporting_a_run_from_elsewhere_than_where_it_was_started(
    changes, want, tmp_path, monkeypatch, capsys
):
    tiny.write_checkpoint(tmp_path / "model", "qwen3_moe")
    config = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": "text", "sequence_length": 9},
        "optimizer": {"learning_rate": 0.1},
        "train": {"steps": 1, "batch_size": 1},
        "output_dir": "run",
    }
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(config | changes | {"data": config["data"] | changes.get("data", {})})
    )
    monkeypatch.chdir(tmp_path / "model")
    assert cli.main(["export", "../run", "../out"]) == 2
    told = capsys.readouterr().err
    ((section, keys),) = changes.items()
    ((key, path),) = keys.items()
    assert want in told
    assert told.count("\n") == 1
    assert told.endswith(
        f" (../run/config.yaml has {section}.{key} {path!r}, relative to the folder where the run was started: start "
        "this command there as well)\n"
    )
    assert not (tmp_path / "out").exists()


def test_any_other_error_is_not_caught(command):
    command(lambda: fail(ZeroDivisionError("a fault of ours")))
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("trian", "error: unknown command 'trian', did you mean train?\n"),
        ("qqq", "error: unknown command 'qqq', expected one of train, export, merge, generate, inspect\n"),
        (
            "--verbose",
            "error: unknown command '--verbose', expected one of train, export, merge, generate, inspect\n",
        ),
    ],
)
def test_unknown_commands(name, want, capsys):
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == want


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown


def test_without_a_command_the_usage_goes_to_stderr(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: jaxmoe COMMAND")
    assert captured.out == ""


def test_run_command_ends_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "a", "b"])
    # The process is that of the tests, and goes on.
    monkeypatch.setattr(cli, "_THREADS_SECONDS", 1e6)
    monkeypatch.setattr(torchless, "_left_out", False)
    for action, code in (
        (lambda _: None, 0),
        (lambda argv: len(argv), 2),
        (lambda _: fail(UserError("no")), 2),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.run_command(action)
        assert ended.value.code == code
    assert capsys.readouterr().err == "error: no\n"


def test_as_a_module_in_a_process_of_its_own():
    program = [sys.executable, "-m", "jaxmoe"]
    version = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith("jaxmoe 0.")
    wrong = subprocess.run([*program, "exprot"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unknown command 'exprot', did you mean export?\n"


@pytest.mark.torch
@pytest.mark.parametrize("command", ["jaxmoe.inspect", "jaxmoe"])
def test_a_command_does_not_import_torch(tmp_path, command):
    """transformers would where it is installed, and takes a second longer."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    arguments = ["inspect"] * (command == "jaxmoe") + [str(tmp_path / "config.json")]
    told = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    told += (
        f"; import runpy; sys.argv = ['', *{arguments!r}]; runpy.run_module({command!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen3_moe" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


HEAVY = (
    "jax",
    "flax",
    "orbax",
    "optax",
    "grain",
    "pyarrow",
    "tokenizers",
    "transformers",
    "torch",
    "numpy",
    "rich",
)


@pytest.mark.parametrize(
    "code",
    [
        "import jaxmoe; jaxmoe.UserError",
        "from jaxmoe import cli; cli.main(['--version'])",
        "from jaxmoe import cli; cli.main(['train', '--keys'])",
        "from jaxmoe import cli; cli.main(['train', 'train.steps=-1'])",
        *(f"import jaxmoe.{name} as c; c.main(['--help'])" for name in cli.COMMANDS),
        *(f"from jaxmoe import cli; cli.main(['{name}', '--nonsense'])" for name in cli.COMMANDS),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    """What takes long to import may be asked for by the work itself alone: not by help or a mistake in a command."""
    told = (
        f"import atexit, sys; atexit.register(lambda: print('with', *sys.modules, file=sys.stderr)); {code}"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.rpartition("with ")[2].split()).isdisjoint(HEAVY)


def test_the_public_names_are_there_before_they_are_loaded():
    code = (
        "import jaxmoe; assert {*jaxmoe.__all__} <= {*dir(jaxmoe)}; print(jaxmoe.from_pretrained.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "jaxmoe.interop.pretrained\n"), done.stderr


def test_what_a_library_must_not_be_interrupted_in_is_done_first(command):
    done = []

    def action():
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            wait(3 * signals.AGAIN_SECONDS)
            done.append("save")
        wait()
        done.append("never")

    command(action)
    assert cli.main(["train"]) == 130
    assert done == ["save"]


def test_a_second_signal_is_not_deferred(command):
    done = []

    def action():
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    command(action)
    assert cli.main(["train"]) == 130
    assert done == []


def warn():
    warnings.warn("a library's", RuntimeWarning, stacklevel=1)
    logging.getLogger("some.library").warning("another %s", "library's")
    logging.getLogger("some.library").info("nobody asked")


@pytest.mark.filterwarnings("always")
def test_warnings_before_a_mistake_are_not_told(command, capsys):
    command(lambda: warn() or fail(UserError("train.steps: found 0")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr() == ("", "error: train.steps: found 0\n")


@pytest.mark.filterwarnings("always")
def test_warnings_of_a_command_that_ends_well_or_by_a_fault_are(command, capsys):
    told = "warning: a library's\nwarning: another library's\n"
    command(warn)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr() == ("", told)
    command(lambda: warn() or fail(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["train"])
    assert capsys.readouterr() == ("", told)


@pytest.mark.filterwarnings("always")
def test_a_command_that_has_begun_tells_warnings_as_they_come(command, capsys):
    shown = []

    def action():
        warn()
        assert not shown
        notices.begin(shown.append)
        assert len(shown) == 2
        warnings.warn("late", RuntimeWarning, stacklevel=1)
        raise UserError("and then a mistake")

    show, handlers = warnings.showwarning, list(logging.getLogger().handlers)
    command(action)
    assert cli.main(["train"]) == 2
    assert shown == ["warning: a library's", "warning: another library's", "warning: late"]
    assert capsys.readouterr() == ("", "error: and then a mistake\n")
    assert (warnings.showwarning, logging.getLogger().handlers) == (show, handlers)


class JaxRuntimeError(RuntimeError):
    """Stands for jax's."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore"),
            "Out of memory allocating 12",
        ),
        (MemoryError("Unable to allocate 9.0 TiB"), "Unable to allocate 9.0 TiB"),
    ],
)
def test_memory_that_is_not_there_is_told_in_one_line(command, capsys, error, told):
    command(lambda: fail(error))
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: out of memory ({told}")
    assert len(err.splitlines()) == 1
    command(lambda: fail(JaxRuntimeError("INTERNAL: a fault")))
    with pytest.raises(JaxRuntimeError, match="a fault"):
        cli.main(["train"])


def test_threads_of_libraries_do_not_outlive_a_signal():
    """orbax's are not daemons: the interpreter would wait for them at its end."""
    program = """
        import logging, signal, threading, time
        from jaxmoe import cli
        cli._THREADS_SECONDS = 0.5
        class Loop:
            def __del__(self):
                raise RuntimeError("Event loop is closed")
        def late():
            time.sleep(0.1)
            Loop()
            logging.getLogger("asyncio").error("never retrieved")
            threading.Event().wait()
        def main(argv):
            threading.Thread(target=late).start()
            signal.raise_signal(signal.SIGINT)
        cli.run_command(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_library_that_logs_wrongly_ends_nothing(capsys):
    wrong = logging.LogRecord("some.library", logging.WARNING, "file.py", 1, "%d steps", ("x",), None)
    with notices.Notices() as held:
        held.emit(wrong)
    assert capsys.readouterr() == ("", "warning: %d steps\n")
