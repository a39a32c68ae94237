"""Names of the tensors in an adapter's file."""

import re
from typing import Literal, NamedTuple

PREFIX = "base_model.model."
BASE = ".base_layer"

Part = Literal["a", "b", "magnitude"]

_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(\.weight)?)"
)
_PARTS: dict[str, Part] = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


class Key(NamedTuple):
    """One tensor of an adapter's file.

    Attributes:
        module: of the model.
        depth: wrappers of other parameters of the module around this one.
        part: what it is; None of a parameter that is stored as a whole.
        parameter: the name of such a one within its module.
        embedding: it is spelt as PEFT does for embeddings.
    """

    module: str
    depth: int = 0
    part: Part | None = None
    parameter: str = ""
    embedding: bool = False


def parse_key(name: str) -> Key:
    """What a tensor's name says. Files that PEFT did not write itself may lack its prefix."""
    name = name.removeprefix(PREFIX)
    found = _FACTOR.fullmatch(name)
    if found is None:
        module, _, parameter = name.rpartition(".")
        return Key(module.removesuffix(BASE), parameter=parameter)
    depth, spelt = len(found["depth"]) // len(BASE), found["part"]
    return Key(found["module"], depth, _PARTS[spelt], embedding="embedding" in spelt)


def factor_key(module: str, depth: int, part: Part, *, embedding: bool = False) -> str:
    """The name under which PEFT stores a factor."""
    if part == "magnitude":
        spelt = "lora_magnitude_vector"
    else:
        spelt = f"lora_embedding_{part.upper()}" if embedding else f"lora_{part.upper()}.weight"
    return f"{PREFIX}{module}{BASE * depth}.{spelt}"


def whole_key(module: str, parameter: str, *, adapted: bool = False) -> str:
    """The name of a parameter that is stored as a whole; `adapted` where there is a pair on it as well."""
    return f"{PREFIX}{module}{BASE if adapted else ''}.{parameter}"
