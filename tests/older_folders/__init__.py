"""Folders that older transformers wrote, read today: `make older-folders`. For maintainers; no test runs it.

Each older version is installed in a folder of its own, in front of everything else for the process that writes with
it (`write`), and has torch and the rest from the environment at hand. `read` then opens every folder with today's
transformers and with jaxmoe, and `report` keeps what was found.
"""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
VERSIONS = ("4.45.2", "4.51.3", "4.53.3", "4.57.6", "5.0.0", "5.5.4", "5.10.4")
DOCUMENT = ROOT / "interop" / "OLDER_FOLDERS.md"
