"""YAML -> plain data: numbers, text, lists, mappings and nothing else, each key once."""

from __future__ import annotations

from typing import Any

import yaml

from hpgr.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def plain_value(text: str | bytes) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, holds objects, an impossible date or number, a key twice, or is nested too deep.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def plain_mapping(text: str | bytes, what: str) -> dict[str, Any]:
    """The mapping of a YAML file, empty for an empty one; `what` names the file in errors.

    Raises:
        ConfigError: it is none.
    """
    try:
        raw = plain_value(text)
    except ValueError as error:
        raise ConfigError(f"{what} is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{what}: got a {type(raw).__name__}, expected a mapping of keys")
    return raw
