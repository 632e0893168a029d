"""Fixtures of several test files of training."""

import pytest

from .fake_run import replace_slow_parts


@pytest.fixture
def fast(monkeypatch):
    """Runs of milliseconds; see `fake_run`."""
    return replace_slow_parts(monkeypatch)
