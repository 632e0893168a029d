"""Reading YAML and JSON from any hand: a file that cannot be read is a `ValueError` with the reason.

YAML is that of the safe loader, narrower in three ways: a key given twice is refused (the loader takes the last one),
nothing may contain itself, and nothing may be nested deeper than `_DEPTH`. So whatever was read can be compared, copied
and printed.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

import yaml

_DEPTH = 50


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.deep_construct = True  # an object is finished before it can be named, so none can contain itself

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
        ValueError: for a text that is not YAML, or not as narrow as said above.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # what the loader raises for values that are not of their explicit tags
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_json(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        ValueError: for a text that is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def misfit(value: Any, schema: Any, name: str = "") -> str:
    """What is wrong with `value` against `schema`, in words; empty where nothing is.

    A schema is a type, or a dictionary: each of its keys must be there and fit its own schema. A `float` must be finite
    and may be a whole number.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} must be a mapping, got {reprlib.repr(value)}"
        missing = [f"{name}{'.' if name else ''}{key}" for key in schema if key not in value]
        if missing:
            return f"{missing[0]} is missing"
        inner = (misfit(value[key], kind, f"{name}{'.' if name else ''}{key}") for key, kind in schema.items())
        return next(filter(None, inner), "")
    kinds = (int, float) if schema is float else schema
    fits = isinstance(value, kinds) and not isinstance(value, bool) and not (schema is float and not _finite(value))
    return "" if fits else f"{name} must be {_WORDS[schema]}, got {reprlib.repr(value)}"


def differs(one: Any, two: Any, name: str = "") -> str:
    """The first difference of two nested dictionaries, in words; empty where they are equal."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in dict.fromkeys([*one, *two]):
            if said := differs(one.get(key), two.get(key), f"{name}{'.' if name else ''}{key}"):
                return said
        return ""
    return "" if one == two else f"{name} was {one}, is {two}"


_WORDS = {int: "a whole number", float: "a finite number", str: "a word", list: "a list"}


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
