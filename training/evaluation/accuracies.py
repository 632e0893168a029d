"""The accuracies of an evaluation as lines of a table, for the terminal and the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..pages.formats import estimate, interval, points, share
from .summary import KINDS, MEAN_OF_SETS


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """The figures of an evaluation, by kind and test set, as lines of text."""
    rows = []
    for kind in KINDS:
        summary = found[kind]
        ends = f"{summary['tokens']:.0f} tokens, {summary['cut_off']:.1%} cut off"
        rows.append([f"  {kind}", share(summary), _interval(summary), f"{_asked(summary)}; {ends}"])
        rows += [
            [f"    pass@{k}", f"{one['value']:.1%}", low_high(one), ""]
            for k, one in summary["pass"].items()
            if k != "1"
        ]
        for name, of in summary.get("sets", {}).items():
            rows.append([f"    {name}", share(of), _interval(of), f"{_asked(of)}{_best(of)}"])
        if mean := summary.get("mean_of_sets"):
            rows.append([f"    {MEAN_OF_SETS}", share(mean), low_high(mean), ""])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def change_lines(result: Mapping[str, Any], kind: str) -> list[list[str]]:
    """What training changed in each test set and in their mean: name, before, after, points with their interval."""
    before, after, change = (result[key][kind] for key in ("before", "after", "difference"))
    if "sets" not in before:
        return []
    rows = [
        (f"{name}, {estimate(one)}" if kind == KINDS[0] else name, one, after["sets"][name], change["sets"][name])
        for name, one in before["sets"].items()
    ]
    rows.append((MEAN_OF_SETS, before["mean_of_sets"], after["mean_of_sets"], change["mean_of_sets"]))
    return [
        [name, share(one), share(two), f"{points(moved['difference'])} ({interval(moved['low'], moved['high'])})"]
        for name, one, two, moved in rows
    ]


def pass_lines(result: Mapping[str, Any], kind: str) -> list[list[str]]:
    """pass@k before and after, where there are several responses: its name, and both with their intervals."""
    before, after = (result[key][kind].get("pass", {}) for key in ("before", "after"))
    return [
        [f"pass@{k}", *(f"{of[k]['value']:.1%} {low_high(of[k])}" for of in (before, after))]
        for k in before
        if k in after and len(before) > 1
    ]


def low_high(found: Mapping[str, float]) -> str:
    """An interval of shares."""
    return f"({found['low']:.1%} to {found['high']:.1%})"


def _interval(summary: Mapping[str, Any]) -> str:
    return low_high(summary["pass"]["1"])


def _asked(summary: Mapping[str, Any]) -> str:
    return f"{estimate(summary)} of {summary['instances']} instances"


def _best(summary: Mapping[str, Any]) -> str:
    """pass@k at the largest k, where there is more than one response."""
    k, best = list(summary["pass"].items())[-1]
    return f"; pass@{k} {best['value']:.1%} {low_high(best)}" if k != "1" else ""
