"""What keys of a configuration hold: numbers, texts and paths within bounds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
)

from jaxmoe.files import why_unusable

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4); take what was meant, in nested values too."""
    if isinstance(value, Mapping):
        return {key: float_from_yaml(item) for key, item in value.items()}
    if isinstance(value, list):
        return [float_from_yaml(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _float32(value: float) -> float:
    """Training computes in float32, where what is larger is infinity and what is smaller is 0."""
    if value and not 2.0**-126 <= abs(value) < 2.0**128:
        raise ValueError(f"found {value!r}, expected a number that float32 holds, from 1.2e-38 to 3.4e+38")
    return value


def tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"found {value!r}, whose character {error.start} is half a surrogate pair; expected text that UTF-8 "
            "can hold"
        ) from None
    return value


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a non-empty string")
    return value


def kind_of(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    return "mapping" if isinstance(value, Mapping | BaseModel) else None


def _path(value: str) -> str:
    # Who exports a run may not be allowed to see its data.
    unusable = why_unusable(value, allow=(PermissionError,))
    if unusable is not None:
        raise ValueError(f"{unusable}, expected another one")
    return str(Path(value).expanduser()) if value.startswith("~") else value


T = TypeVar("T")
Number = Annotated[
    float, BeforeValidator(float_from_yaml), Field(allow_inf_nan=False), AfterValidator(_float32)
]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # steps and tokens are counted in int32
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Prose = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Prose, AfterValidator(_filled)]
PathText = Annotated[Text, AfterValidator(_path)]
Json = Annotated[dict[str, JsonValue], BeforeValidator(float_from_yaml)]
Items = Annotated[tuple[T, ...], BeforeValidator(tuple_from_list)]


class Section(BaseModel):
    """Unknown keys are refused, and so are values of another type: "8" is no integer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
