"""What every test runs under: Triton interpreted where there is no GPU, and fresh memory full of NaN."""

from __future__ import annotations

import os

import pytest
import torch

from tests.fuzz.tally import lines

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by Triton when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # not `keywords`: they hold folder names too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for line in lines(report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"skipped for want of a GPU: {sum('CUDA device' in str(r.longrepr) for r in skipped)}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN: a position that nobody writes becomes visible."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
