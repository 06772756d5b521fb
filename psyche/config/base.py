"""Building blocks of the configuration: strict models, bounded types, errors that name their field."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from psyche.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seconds = Positive
HexDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PeerId = Annotated[str, StringConstraints(pattern=r"^12D3Koo[1-9A-HJ-NP-Za-km-z]{45}$")]


class Strict(BaseModel):
    """A model that rejects unknown keys and implicit conversions, and is immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


T = TypeVar("T", bound=BaseModel)


def validated(kind: type[T], tree: Any, where: str) -> T:
    """Validate ``tree`` as ``kind``. Raises :class:`ConfigError`; ``where`` begins its message."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error_text(error)}") from None


def error_text(error: ValidationError) -> str:
    """Format every failure as ``field.path: reason``, separated by ``; ``."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "file"
        reason = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: {reason}")
    return "; ".join(lines)
