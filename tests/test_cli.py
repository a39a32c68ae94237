import subprocess
import sys
import types

import pytest

from jaxmoe import cli
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


def test_an_interrupt_is_exit_code_130(command, capsys):
    command(lambda: fail(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_any_other_error_is_not_caught(command):
    command(lambda: fail(ZeroDivisionError("a fault of ours")))
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("trian", "error: unknown command 'trian', did you mean train?\n"),
        ("qqq", "error: unknown command 'qqq', expected one of train, export, generate, inspect\n"),
        (
            "--verbose",
            "error: unknown command '--verbose', expected one of train, export, generate, inspect\n",
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


def test_no_command_is_imported_before_it_is_asked_for():
    code = "import sys, jaxmoe.cli; jaxmoe.cli.main(['--version']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
