"""Fixtures of the tests of folders."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def folders(tmp_path):
    return SimpleNamespace(source=tmp_path / "source", export=tmp_path / "export")
