"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest

from .shapes import PROFILES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-profile", choices=PROFILES, default="quick", help="which shapes and how many rounds")
