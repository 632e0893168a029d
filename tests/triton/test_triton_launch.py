"""New lengths, batches, strides and settings compile nothing new: a kernel is compiled once a head size and dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", name="variants")
def _variants() -> dict[str, dict[str, list[str]]]:
    """The report of the script, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compiled_variants"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_nothing_new_is_compiled(variants: dict[str, dict[str, list[str]]]) -> None:
    assert variants["ours"]
    assert {name: labels for name, labels in variants["ours"].items() if labels} == {}


def test_the_keys_tell_calls_apart(variants: dict[str, dict[str, list[str]]]) -> None:
    """As Triton specialises by default, the same calls compile anew for many a length: so the test above can fail."""
    assert variants["plain"]
    for name, labels in variants["plain"].items():
        assert sum(label.startswith("length") for label in labels) >= 4, name
