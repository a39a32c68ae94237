"""What was measured on a device: that the kernels are right there, and which tiles are fast.

One JSON file for each kind of device, shipped with the package and written by ``python -m jaxmoe.kernels.tune``.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "measured"


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Of one kind of device.

    Attributes:
        device: its kind.
        checked: jax version → the largest error of any kernel's result there, over that of the naive computation.
        tiles: key of a launch (`launch_key`) → fields of its tile sizes.
    """

    device: str
    checked: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tiles: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path = FOLDER) -> Path:
        """Write the device's file; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _file_name(self.device)
        content = {"device": self.device, "checked": dict(self.checked), "tiles": dict(self.tiles)}
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return path


@functools.cache
def measured_on(device: str, folder: Path = FOLDER) -> Measured:
    """What is known of a kind of device; nothing, if it has no file."""
    path = folder / _file_name(device)
    if not path.exists():
        return Measured(device)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Measured(content["device"], content["checked"], content["tiles"])


def launch_key(kernel: str, **sizes: int | bool | str) -> str:
    """The key of a launch, such as "matmul columns=768 parts=2 rows=128"."""
    return " ".join([kernel, *(f"{name}={value}" for name, value in sorted(sizes.items()))])


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"
