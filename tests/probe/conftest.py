"""Beside the tests' results: how many model types are measured, refused, or cannot be built."""

from __future__ import annotations

from collections import Counter


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    counts: Counter[str] = Counter()
    for report in reports:
        if getattr(report, "when", None) == "call":
            counts.update(value for name, value in report.user_properties if name == "outcome")
    if counts:
        told = ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common())
        terminalreporter.write_line(f"causal model types: {told}")
