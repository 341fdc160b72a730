"""What all sections share: ranges of numbers, and a base that is closed and frozen."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change. Text is read as a number where one
    is expected, for YAML takes 1e-3 for text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def holds_key(address: str) -> bool:
    """Whether an address has a secret in it, which every record of it would repeat."""
    parts = urlsplit(address)
    return "@" in parts.netloc or "key=" in parts.query
