"""From entries to a markdown table and plots."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .entries import Entry
from .fits import lines as memory_lines
from .suites import SUITES
from .targets import verdicts

_CEILINGS = ("read loop", "sum of a buffer", "copy kernel", "multiply-add loop", "matrix product")
# Ours first and dark; the rest by hue, told apart by markers as well.
_COLORS = {"rhythm": ("#0b3c5d", "#1d70a2", "#5aa9d6", "#9fcbe8")}
_OTHERS = ("#b03a2e", "#d68910", "#7d3c98", "#1e8449", "#616a6b", "#a04000", "#2e4053")
_OURS = ("rhythm", "probe", "+ credit", "coupled credit", "credit's own")
_MARKERS = "osD^vPX*<>"


def seconds(value: float | None) -> str:
    """A time in the unit that keeps three digits."""
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def size(value: int | None) -> str:
    """Memory in the unit that keeps three digits."""
    if value is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _by_device_and_suite(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """(device, suite) -> entries, in the order met."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.environment["device"], entry.suite), []).append(entry)
    return found


def _line(entry: Entry) -> str:
    if entry.status != "ok":
        cells = [entry.shape, entry.rival, f"{entry.status}: {entry.reason}", *[""] * 7]
    else:
        gives = ", ".join(entry.gives)
        cells = [
            entry.shape,
            entry.rival,
            gives,
            seconds(entry.median),
            f"{seconds(entry.p20)} to {seconds(entry.p80)}",
            _ratio(entry.ratio),
            seconds(entry.cpu),
            _share(entry.bandwidth_share),
            _share(entry.flops_share),
            size(entry.peak_bytes),
        ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(entries: list[Entry]) -> str:
    """Markdown: the targets, then every entry of each device and suite, whether or not ours is the fastest."""
    parts = []
    lines = verdicts(entries)
    if lines:
        parts.append("## Targets\n\n" + "\n".join(f"- {line}" for line in lines))
    if lines := memory_lines(entries):
        parts.append("## What has no room\n\n" + "\n".join(f"- {line}" for line in lines))
    for (device, suite), found in _by_device_and_suite(entries).items():
        about = found[-1].environment
        yardstick = next((entry.yardstick for entry in found if entry.yardstick), "none")
        commits = ", ".join(sorted({entry.environment["commit"] for entry in found}))
        peaks = ", ".join(sorted({entry.peak_by for entry in found if entry.peak_by}))
        parts.append(
            f"## {SUITES[suite].title} (`{suite}`), {device}\n\n"
            f"torch {about['torch']}, Triton {about['triton']}, Python {about['python']}, CUDA {about['cuda']}, "
            f"{about['threads']} threads, commit {commits}, {found[-1].time}. Ratio: to {yardstick}. "
            f"Peak memory by: {peaks or 'nothing'}.\n\n"
            "| shape | rival | gives | median | p20 to p80 | ratio | CPU | bandwidth | FMA | peak memory |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(map(_line, found))
        )
    return "\n\n".join(parts) + "\n"


def _family(entry: Entry) -> str:
    """The shape's name without its number of tokens, which is the x axis of a plot."""
    return re.sub(r" ?\bT\d+", "", entry.shape)


def _style(rivals: list[str]) -> dict[str, dict[str, Any]]:
    ours = [name for name in rivals if any(part in name for part in _OURS)]
    others = [name for name in rivals if name not in ours]
    styles = {}
    for index, name in enumerate(ours):
        styles[name] = {"color": _COLORS["rhythm"][index % 4], "linewidth": 2.2}
    for index, name in enumerate(others):
        styles[name] = {"color": _OTHERS[index % len(_OTHERS)], "linewidth": 1.3}
    for index, name in enumerate(rivals):
        styles[name]["marker"] = _MARKERS[index % len(_MARKERS)]
    return styles


def plots(entries: list[Entry], folder: Path) -> list[Path]:
    """One PNG for each device and suite: time and peak memory against tokens, a column a family of shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (device, suite), found in _by_device_and_suite(entries).items():
        timed = [entry for entry in found if entry.median is not None and entry.rival not in _CEILINGS]
        if not timed:
            continue
        families = list(dict.fromkeys(map(_family, timed)))
        figure, axes = plt.subplots(
            2, len(families), figsize=(1.5 + 4.6 * len(families), 7.6), squeeze=False, layout="constrained"
        )
        styles = _style(list(dict.fromkeys(entry.rival for entry in timed)))
        for column, family in enumerate(families):
            members = [entry for entry in timed if _family(entry) == family]
            _panel(axes[0][column], members, styles, "median")
            _panel(axes[1][column], members, styles, "peak_bytes")
            axes[0][column].set_title(family, fontsize=10)
        axes[0][0].set_ylabel("time (median, p20 to p80)")
        axes[1][0].set_ylabel("peak memory beyond the inputs")
        handles = [plt.Line2D([], [], label=name, **style) for name, style in styles.items()]
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
        figure.suptitle(f"{SUITES[suite].title}, {device}", fontsize=12, x=0.01, horizontalalignment="left")
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{suite}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def _panel(axis: Any, entries: list[Entry], styles: dict[str, dict[str, Any]], quantity: str) -> None:
    from matplotlib.ticker import LogLocator

    lengths = sorted({entry.dimensions["length"] for entry in entries})
    for name, style in styles.items():
        own = [entry for entry in entries if entry.rival == name and getattr(entry, quantity)]
        points = [(x.dimensions["length"], getattr(x, quantity), x) for x in own]
        points.sort(key=lambda point: point[0])
        if not points:
            continue
        xs = [x for x, _, _ in points]
        axis.plot(xs, [y for _, y, _ in points], markersize=5, **style)
        if quantity == "median":
            early, late = [entry.p20 for _, _, entry in points], [entry.p80 for _, _, entry in points]
            axis.fill_between(xs, early, late, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    if quantity == "median":
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20))
        axis.yaxis.set_major_formatter(lambda y, _: seconds(y))
    else:
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_locator(LogLocator(base=2, numticks=10))
        axis.yaxis.set_major_formatter(lambda y, _: size(round(y)))
    axis.set_xticks(lengths, [f"{x:,}" for x in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
