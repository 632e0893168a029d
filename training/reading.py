"""Reading YAML and JSON that anyone may have written: what cannot be read is a `ValueError` of one reason.

YAML here is that of the safe loader, narrower in three ways: a key given twice is refused instead of the last one
winning, nothing contains itself, and nothing is nested deeper than any recipe is. So whatever was read can be
compared, copied and printed.
"""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

_DEPTH = 50


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.deep_construct = True  # whole objects only, so an alias inside of what it names has nothing to stand for

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _DEPTH:
            raise ValueError(f"nested deeper than {_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                raise ValueError(f"line {line}: {key.value} is given twice, first in line {first}")
            lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What a text of YAML holds.

    Raises:
        ValueError: where it is none, or one of those above.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # the loader's own stumbling over values that are not of their explicit tags
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_json(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        ValueError: where it is none, or nested too deep to be looked at.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def misfit(value: Any, schema: Any, name: str = "") -> str:
    """Where `value` is not what `schema` says, in words; empty where it is.

    A schema is a dictionary of keys that must be there, each with its schema, or a type; a `float` may be whole and is
    finite.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is not a group of values"
        missing = [f"{name}{'.' if name else ''}{key}" for key in schema if key not in value]
        if missing:
            return f"{missing[0]} is missing"
        inner = (misfit(value[key], kind, f"{name}{'.' if name else ''}{key}") for key, kind in schema.items())
        return next(filter(None, inner), "")
    kinds = (int, float) if schema is float else schema
    fits = isinstance(value, kinds) and not isinstance(value, bool) and not (schema is float and not _finite(value))
    return "" if fits else f"{name} is not {_WORDS[schema]}"


_WORDS = {int: "a whole number", float: "a finite number", str: "a word"}


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
