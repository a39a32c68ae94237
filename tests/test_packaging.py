"""Everything that is in the folders is in the wheel."""

import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.once  # Names of files and of packages.

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inside)))
    assert sorted(setuptools["packages"]) == sorted(found)


def test_every_package_folder_is_a_package():
    folders = {file.parent for top in ("jaxmoe", "kernels", "interop") for file in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
