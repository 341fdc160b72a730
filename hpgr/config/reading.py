"""YAML and `--set a.b=c` -> a validated tree, and back."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from hpgr.config.base import Section
from hpgr.config.plain import plain_mapping, plain_value
from hpgr.config.tree import Config
from hpgr.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (null: all defaults), apply `a.b=c` overrides, validate everything at once.

    Raises:
        ConfigError: with one line a fault: dotted path, what was got, what is allowed, the nearest key for a typo.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot read config {path}: {error.strerror or error}; give an existing YAML file"
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {path} is not YAML: {error}") from None
        raw = copy.deepcopy(plain_mapping(text, f"config {path}"))
    faults = [fault for text in overrides if (fault := override(raw, text))]
    return validate(raw, faults)


def validate(raw: dict[str, Any], faults: Sequence[str] = ()) -> Config:
    """Build the tree from plain data; `faults` found before are reported together with the tree's own."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults = [*faults, *(_describe(e) for e in _one_a_key(error.errors()))]
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in the configuration:\n" + "\n".join(f"  - {f}" for f in faults))
    return config


def override(raw: dict[str, Any], text: str) -> str | None:
    """Apply one `a.b=c` in place; returns the fault's text if it has none of that form."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return f"--set {text!r}: expected a.b=value"
    try:
        parsed = _number(plain_value(value))
    except ValueError:
        return f"--set {text!r}: {value!r} is not a YAML value"
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            return f"--set {text!r}: {part} holds a value, not a section"
        node = child
    node[last] = parsed
    return None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_a_key(errors: Sequence[Any]) -> list[Any]:
    """Pydantic names every alternative of a union; where one is a word such as auto, say both in one message."""
    words = {tuple(e["loc"][:-1]): e["msg"][:1].lower() + e["msg"][1:] for e in errors if _is_word(e)}
    out = []
    for error in errors:
        place = tuple(error["loc"][:-1])
        if not error["loc"] or place not in words:
            out.append(error)
        elif not _is_word(error):
            out.append(error | {"loc": place, "msg": f"{error['msg']}; {words[place]}"})
    return out


def _is_word(error: Any) -> bool:
    return bool(error["loc"]) and str(error["loc"][-1]).startswith("literal[")


def _describe(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    path, kind, got = ".".join(location), error["type"], error.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(location, Config)
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    text = repr(got)
    return f"{path}: got {text if len(text) < 80 else text[:77] + '...'}; {message[:1].lower() + message[1:]}"


def faults_of(error: ValidationError, root: type[Section]) -> list[str]:
    """A line for each fault of a tree beside the configuration, such as a space."""
    out = []
    for e in error.errors():
        location = [str(part) for part in e["loc"]]
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            out.append(_unknown_key(location, root))
        else:
            out.append(f"{'.'.join(location)}: {message}" if location else message)
    return out


def _unknown_key(location: Sequence[str], root: type[Section]) -> str:
    allowed = sorted(_section(location[:-1], root).model_fields)
    near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.6)
    hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"allowed: {', '.join(allowed)}"
    return f"{'.'.join(location)}: unknown key; {hint}"


def _section(location: Sequence[str], root: type[Section]) -> type[Section]:
    """The model class at a dotted path below `root`, looking through lists and optionals."""
    section = root
    for part in location:
        field = section.model_fields.get(part)
        if field is not None:
            section = inner_section(field.annotation) or section
    return section


def inner_section(annotation: Any) -> type[Section] | None:
    """The section class inside a field's annotation, looking through lists and optionals."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (inner_section(arg) for arg in get_args(annotation))
    return next((inner for inner in found if inner), None)


def dump(config: Config) -> dict[str, Any]:
    """Plain data of the resolved tree; `validate(dump(c)) == c`."""
    return json.loads(config.model_dump_json())


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)
