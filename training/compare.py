"""`compare`: several runs side by side, paired by instance, in the terminal and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import curves, forest
from .recipe import RecipeError
from .report import page, section, table
from .statistics import PairedDifference, paired_difference
from .train import METRICS, RESULT


def compare_runs(folders: Sequence[Path], output: Path) -> Path:
    """Compare the final models of runs with that of the first; prints a table and writes a page.

    Raises:
        RecipeError: where a folder holds no finished run, or runs were evaluated on different instances.
    """
    runs = [_read(folder) for folder in folders]
    base = runs[0]
    for run in runs[1:]:
        for key in ("split", "instances"):
            if run[key] != base[key]:
                raise RecipeError(f"{run['folder']}: evaluated on {run[key]} {key}, {base['folder']} on {base[key]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_page(runs), encoding="utf-8")
    print(_text(runs))
    print(f"\n  page     {output}")
    return output


def against(base: dict[str, Any], run: dict[str, Any], kind: str) -> PairedDifference:
    """How the final model of `run` differs from that of `base`, instance by instance."""
    right = [[c == "1" for c in r["after"][kind]["right"]] for r in (base, run)]
    return paired_difference(*right)


def _read(folder: Path) -> dict[str, Any]:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"{folder}: no finished run ({error.strerror}: {error.filename})") from error
    result["folder"], result["lines"] = str(folder), [json.loads(line) for line in lines]
    result["instances"] = result["after"]["sampled"]["instances"]
    return result


_HEAD = ["run", "mode", "seed", "", "before", "after", "against the first", "tokens", "minutes"]


def _rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Two lines a run: sampled and greedy."""
    rows = []
    for i, run in enumerate(runs):
        for kind in ("sampled", "greedy"):
            before, after = run["before"][kind], run["after"][kind]
            change = against(runs[0], run, kind)
            points = f"{change.difference * 100:+.1f} ({change.low * 100:+.1f} to {change.high * 100:+.1f})"
            name = [run["folder"], run["mode"], str(run["seed"])] if kind == "sampled" else ["", "", ""]
            rows.append(
                [
                    *name,
                    kind,
                    f"{before['accuracy']:.1%}",
                    f"{after['accuracy']:.1%} ± {after['standard_error']:.1%}",
                    points if i > 0 else "-",
                    f"{after['tokens']:.0f}",
                    f"{run['seconds']['training'] / 60:.1f}" if kind == "sampled" else "",
                ]
            )
    return rows


def _warning(runs: list[dict[str, Any]]) -> str:
    """A sentence for runs that cannot be compared as methods."""
    base = runs[0]["before"]["greedy"]["right"]
    others = [run["folder"] for run in runs if run["before"]["greedy"]["right"] != base]
    if not others:
        return ""
    return f"Not started from the model that {runs[0]['folder']} started from: {', '.join(others)}."


def _text(runs: list[dict[str, Any]]) -> str:
    rows = [_HEAD, *_rows(runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    warning = _warning(runs)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *([warning] if warning else [])])


def _page(runs: list[dict[str, Any]]) -> str:
    names = [run["folder"] for run in runs]
    note = (
        f"{runs[0]['instances']} instances of the {escape(runs[0]['split'])} split, answered once by each final model. "
        "± is one binomial standard error. Differences are paired by instance, with 95% intervals; they say how sure "
        "the two models differ, not how sure the two methods do: for that, train several seeds of each."
    )
    bars = "".join(
        f"<figure><figcaption>{kind}</figcaption>"
        + forest([(n, r["after"][kind]["accuracy"], r["after"][kind]["standard_error"]) for n, r in zip(names, runs)])
        + "</figure>"
        for kind in ("sampled", "greedy")
    )
    series = {key: [[(line["step"], line[key]) for line in run["lines"]] for run in runs] for key in _CURVES}
    drawn = "".join(
        f"<figure>{curves(series[key], names, label=caption, show=show)}<figcaption>{caption}</figcaption></figure>"
        for key, (caption, show) in _CURVES.items()
    )
    key = "".join(f'<li class="s{i % 5}">{escape(name)}</li>' for i, name in enumerate(names))
    rows = [[escape(cell) for cell in row] for row in _rows(runs)]
    title = f"{len(runs)} runs compared"
    warning = f'<p class="wrong">{escape(_warning(runs))}</p>' if _warning(runs) else ""
    body = (
        f"<header><p class='kicker'>rhythm-kernels</p><h1>{title}</h1></header>"
        + section(
            "Final models", f'<div class="figures">{bars}</div>{table(_HEAD, rows)}{warning}<p class="note">{note}</p>'
        )
        + section("Learning", f'<ul class="key">{key}</ul><div class="figures">{drawn}</div>')
    )
    return page(title, body)


_CURVES = {
    "accuracy": ("right answers in training, running mean of five steps", "{:.0%}".format),
    "response_tokens": ("response length, tokens", "{:.0f}".format),
    "entropy": ("entropy, nats a token", "{:.2f}".format),
}
