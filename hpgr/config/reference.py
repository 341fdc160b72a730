"""A tree of sections as tables in Markdown: every key with its type, default, range and sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpgr.config.base import Section
from hpgr.config.reading import inner_section

HEAD = "| key | type | default | range | what it is |\n|---|---|---|---|---|"
RANGES = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
LENGTHS = ((MinLen, "min_length", "at least {} long"), (MaxLen, "max_length", "at most {} long"))
PLAIN = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}


def tables(section: type[Section], title: str, prefix: str = "") -> Iterator[str]:
    """The section's own keys under a heading, then each section inside it under its own, depth first."""
    inner: list[tuple[str, type[Section]]] = []
    rows = []
    for name, field in section.model_fields.items():
        path = prefix + name
        below = inner_section(field.annotation)
        if below is not None:
            inner.append((path + container(field.annotation), below))
        if below is None or get_origin(field.annotation) is not None:
            rows.append(row(path, field))
    if rows:
        yield f"### {title}\n\n{HEAD}\n" + "\n".join(rows)
    for path, below in inner:
        yield from tables(below, f"`{path}`", path + ".")


def row(path: str, field: FieldInfo) -> str:
    """One key as a line of a table."""
    cells = [
        f"`{path}`",
        kind(field.annotation),
        default(field),
        ranges(field),
        " ".join((field.description or "").split()),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def container(annotation: Any) -> str:
    """What follows a section's path where it is one of several: `[]` in a list, `.NAME` in a mapping."""
    origin = get_origin(annotation)
    if origin is dict:
        return ".NAME"
    if origin is list:
        return "[]" + container(get_args(annotation)[0])
    return next((found for arg in get_args(annotation) if (found := container(arg))), "")


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind(arg) for arg in args))
    if origin is list:
        return f"list of {kind(args[0])}"
    if origin is dict:
        return f"mapping of {kind(args[0])} to {kind(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return PLAIN.get(annotation) or ("date and time" if annotation.__name__ == "datetime" else "any value")


def default(field: FieldInfo) -> str:
    """The default as YAML takes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{value.isoformat() if hasattr(value, 'isoformat') else json.dumps(value).strip(chr(34))}`"


def ranges(field: FieldInfo) -> str:
    """Bounds of the value, and of its length."""
    found = [f"{sign} {getattr(m, name):g}" for of, name, sign in RANGES for m in bounds(field) if isinstance(m, of)]
    found += [text.format(getattr(m, name)) for of, name, text in LENGTHS for m in bounds(field) if isinstance(m, of)]
    return ", ".join(dict.fromkeys(found))


def bounds(field: FieldInfo) -> list[Any]:
    """Constraints of the field, those of its union's and list's members among them."""
    return [*field.metadata, *inner_bounds(field.annotation)]


def inner_bounds(annotation: Any) -> list[Any]:
    """Constraints written inside an annotation."""
    own = [m for note in getattr(annotation, "__metadata__", ()) for m in getattr(note, "metadata", [note])]
    inside = [] if get_origin(annotation) is Literal else get_args(annotation)
    return own + [m for arg in inside if get_origin(arg) or hasattr(arg, "__metadata__") for m in inner_bounds(arg)]
