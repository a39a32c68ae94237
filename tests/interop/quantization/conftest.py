"""What the tests of quantised folders share."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def folders(tmp_path):
    return SimpleNamespace(source=tmp_path / "source", export=tmp_path / "export", plain=tmp_path / "plain")
