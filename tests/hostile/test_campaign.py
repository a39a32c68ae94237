"""A small part of each quick attack; `make hostile` makes all of them."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.once
def test_some_of_the_attacks():
    command = [sys.executable, "-m", "hostile.campaign", "inputs", "tensors", "configs", "--every", "31"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()[-3:]}
    assert tried["tensors"] == 97
    assert tried["configs"] == 49
    assert tried["inputs"] > 12
