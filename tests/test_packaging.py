"""Everything that is in the folders is in the wheel, and found wherever Python starts."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.once
def test_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    source = ROOT / setuptools["package-dir"][""]
    found = {
        Path(folder).relative_to(source)
        for folder, _, files in os.walk(source, followlinks=True)
        if any(file.endswith((".py", ".yaml")) for file in files)
    }
    assert sorted(setuptools["packages"]) == sorted(".".join(folder.parts) for folder in found)


@pytest.mark.once
def test_every_package_folder_is_a_package():
    folders = {file.parent for top in ("jaxmoe", "kernels", "interop") for file in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.once
def test_links_are_relative():
    """A clone may be moved."""
    links = [path for folder in ("src", "jaxmoe") for path in (ROOT / folder).iterdir() if path.is_symlink()]
    assert sorted(f"{link.relative_to(ROOT)} -> {link.readlink()}" for link in links) == [
        "jaxmoe/configs -> ../configs",
        "jaxmoe/interop -> ../interop",
        "jaxmoe/kernels -> ../kernels",
        "src/jaxmoe -> ../jaxmoe",
    ]


@pytest.mark.parametrize("where", ["above the clone", "beside a script", "in the clone"])
def test_the_package_is_imported_wherever_python_starts(tmp_path, where):
    """A clone is called like the package, and the folder that Python starts in comes first."""
    (tmp_path / "jaxmoe").symlink_to(ROOT)
    code = "import jaxmoe; from importlib.util import find_spec as find; jaxmoe.UserError; "
    code += "print(jaxmoe.__file__); print(find('jaxmoe.kernels').origin); print(find('jaxmoe.configs'))"
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, *(["script.py"] if where == "beside a script" else ["-c", code])],
        cwd=ROOT if where == "in the clone" else tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    package, kernels, configs = done.stdout.splitlines()
    assert Path(package).samefile(ROOT / "jaxmoe" / "__init__.py")
    assert Path(kernels).samefile(ROOT / "kernels" / "__init__.py")
    assert configs != "None"
