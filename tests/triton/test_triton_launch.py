"""New lengths, batches, strides and settings compile nothing new: a kernel is compiled once a head size and dtype."""

from __future__ import annotations

import json

import pytest

from . import compiling


@pytest.fixture(scope="module", name="variants")
def _variants() -> dict[str, dict[str, list[str]]]:
    """The report of the script, in a process that does not interpret."""
    return json.loads(compiling.output("compiled_variants"))


def test_nothing_new_is_compiled(variants: dict[str, dict[str, list[str]]]) -> None:
    assert variants["ours"]
    assert {name: labels for name, labels in variants["ours"].items() if labels} == {}


def test_the_keys_tell_calls_apart(variants: dict[str, dict[str, list[str]]]) -> None:
    """As Triton specialises by default, the same calls compile anew for many a length: so the test above can fail."""
    assert variants["plain"]
    for name, labels in variants["plain"].items():
        assert sum(label.startswith("length") for label in labels) >= 4, name
