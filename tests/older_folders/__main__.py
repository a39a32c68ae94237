"""Make folders with older transformers, read them, and write the tables of interop/OLDER_FOLDERS.md.

    make older-folders
    cd tests && ../.venv/bin/python -m older_folders --versions 5.0.0 --families gpt_oss minimax_m2

Each version is installed once, in .cache/transformers (170 MB); torch comes from the environment at hand. All of them
take about ten minutes on two cores. With fewer versions or families than all, the tables are only printed.
"""

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of the time is compilation
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
if importlib.util.find_spec("torch") is None:
    sys.exit(
        "error: torch is not installed, with which all versions compute: .venv/bin/pip install torch==2.13.0"
    )
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))  # for the form of results

import transformers
from common import write_results
from helpers.readme import place_of

from jaxmoe.interop.families import FAMILIES
from older_folders import DOCUMENT, ROOT, TESTS, VERSIONS
from older_folders.read import Finding, read
from older_folders.report import tables


def installed(version: str) -> Path:
    """A folder with that version of transformers and what it needs beside torch; installed if need be."""
    folder = ROOT / ".cache" / "transformers" / version
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            target = Path(unfinished) / "packages"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-compile",
            ]
            done = subprocess.run(
                [*pip, "--target", str(target), f"transformers=={version}"], capture_output=True, text=True
            )  # pip complains of versions that the environment at hand does not want, which it is not for
            if done.returncode:
                sys.exit(f"error: transformers {version} cannot be installed: {done.stderr.strip()}")
            target.rename(folder)
    return folder


def write(version: str, families: list[str], folder: Path) -> None:
    """Run `older_folders.write` with that version."""
    path = os.pathsep.join(map(str, (installed(version), TESTS)))
    command = [sys.executable, "-m", "older_folders.write", str(folder), *families]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--keep", type=Path, help="a new folder to leave the models in")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        for version in options.versions:
            write(version, options.families, place / version)
            for number, folder in enumerate(sorted((place / version).glob("*"))):
                findings.append(read(folder, version, Path(temporary) / f"export-{version}-{number}"))
            print(f"{version}: read {sum(one.version == version for one in findings)} folders", flush=True)
    findings.sort(
        key=lambda finding: (finding.family, options.versions.index(finding.version), finding.config)
    )
    written = tables(findings, options.versions)
    print(written)
    if (*options.versions, *options.families) != (*VERSIONS, *FAMILIES):
        return
    rows = [dataclasses.asdict(finding) for finding in findings]
    print(write_results("older_folders", rows, transformers=transformers.__version__))
    text = DOCUMENT.read_text(encoding="utf-8")
    start, stop = place_of("older folders", text)
    DOCUMENT.write_text(text[:start] + written + text[stop:], encoding="utf-8")


if __name__ == "__main__":
    main()
