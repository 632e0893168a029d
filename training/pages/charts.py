"""Small charts as inline SVG, coloured by the page's own CSS variables, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 30
_SHORT, _WIDE, _MOST, _LEAD = 16, 50, 3, 17  # of names: letters beside a line, letters above one, lines of text, height


def curve(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    label: str,
    show: Callable[[float], str] = "{:g}".format,
    error: Sequence[float] | None = None,
    floor: float = 0.0,
) -> str:
    """One quantity over steps: every step as a dot, a running mean as a line, and a band of one standard error.

    Args:
        steps, values: the points; at least one.
        label: what a screen reader says, and the beginning of each dot's tooltip.
        show: a value as text.
        error: half the width of the band, a number a point.
        floor: the axis begins here, or lower where the data do.
    """
    spread = [0.0] * len(values) if error is None else list(error)
    low = min(v - e for v, e in zip(values, spread))
    high = max(v + e for v, e in zip(values, spread))
    parts, x, y = _axes(steps, min(low, floor), high, label, show)
    mean = running_mean(values)
    if error is not None:
        edge = [(s, m + e) for s, m, e in zip(steps, mean, spread)]
        edge += [(s, m - e) for s, m, e in reversed(list(zip(steps, mean, spread)))]
        parts.append(f'<polygon class="band" points="{_points(edge, x, y)}"/>')
    parts.append(f'<polyline class="mean" points="{_points(list(zip(steps, mean)), x, y)}"/>')
    for step, value in zip(steps, values):
        title = f"step {step:g}: {escape(label)} {show(value)}"
        dot = f'<circle class="dot" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.2">'
        parts.append(f"{dot}<title>{title}</title></circle>")
    return "".join([*parts, "</svg>"])


def curves(
    series: Sequence[Sequence[tuple[float, float]]],
    names: Sequence[str],
    *,
    label: str,
    show: Callable[[float], str] = "{:g}".format,
) -> str:
    """One quantity of several runs: a running mean each, in the colours `s0` to `s4` of the stylesheet."""
    points = [list(run) for run in series if run]
    steps = [step for run in points for step, _ in run]
    values = [value for run in points for value in running_mean([v for _, v in run])]
    parts, x, y = _axes(steps, min(0.0, *values), max(values), label, show)
    for i, (name, run) in enumerate(zip(names, series)):
        mean = running_mean([value for _, value in run])
        line = _points([(step, m) for (step, _), m in zip(run, mean)], x, y)
        parts.append(f'<polyline class="mean s{i % 5}" points="{line}"><title>{escape(name)}</title></polyline>')
    return "".join([*parts, "</svg>"])


def forest(entries: Sequence[tuple[str, float, float]]) -> str:
    """Shares with 95% whiskers, one line each: (name, share, its standard error)."""
    width, right = 440, 52
    lines = _lines([name for name, _, _ in entries], 30)
    low = min(v - 2 * e for _, v, e in entries)
    high = max(v + 2 * e for _, v, e in entries)
    ticks = nice_ticks(max(0.0, low), min(1.0, high))
    x = _scale(ticks[0], ticks[-1], lines.left, width - right)
    parts = [_open(width, lines.height, "accuracy with 95% intervals"), *_vertical_grid(ticks, x, lines.spans)]
    for i, ((_, value, error), name, at) in enumerate(zip(entries, lines.names, lines.middles)):
        parts += [name, f'<g class="s{i % 5}">{_share_whisker(x, value, error, at)}']
        parts.append(f'<circle class="point" cx="{x(value):.1f}" cy="{at:.1f}" r="4.5"/></g>')
    return "".join([*parts, "</svg>"])


def strip(
    entries: Sequence[tuple[str, Sequence[float], float, float, float] | None],
    *,
    label: str,
    show: Callable[[float], str],
    tick: Callable[[float], str],
    zero: bool = False,
) -> str:
    """Several values a line as small rings, above them their mean and its interval: (name, values, mean, low, high).

    An entry of None takes no line, but a colour: two charts of the same arms agree in colour. An interval that reaches
    far beyond every dot is cut off at the frame, without its end mark, so that the rings stay apart.

    Args:
        label: what a screen reader says.
        show: a value as text.
        tick: a value as text at the axis.
        zero: whether 0 is on the axis, as a line.
    """
    kept = [entry for entry in entries if entry is not None]
    dots = [value for _, values, *_ in kept for value in values] + ([0.0] if zero else [])
    margin = max(max(dots) - min(dots), 1e-3 * max(abs(v) for v in dots), 1e-9)
    low = max(min(*dots, *(entry[3] for entry in kept)), min(dots) - margin)
    high = min(max(*dots, *(entry[4] for entry in kept)), max(dots) + margin)
    ticks = nice_ticks(low, high)
    width, right = 440, 24
    lines = _lines([entry[0] for entry in kept], 44)
    x = _scale(ticks[0], ticks[-1], lines.left, width - right)
    parts = [_open(width, lines.height, label), *_vertical_grid(ticks, x, lines.spans, tick)]
    if zero:
        parts += [
            f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            for top, bottom in lines.spans
        ]
    colours = [i % 5 for i, entry in enumerate(entries) if entry is not None]
    for (_, values, mean, *ends), colour, name, at in zip(kept, colours, lines.names, lines.middles):
        parts += [name, f'<g class="s{colour}">']
        if ends[0] < ends[1]:
            low, high = (min(max(end, ticks[0]), ticks[-1]) for end in ends)
            parts.append(_whisker(x(low), x(high), at, [x(end) for end in ends if end in (low, high)]))
        parts.append(f'<circle class="point" cx="{x(mean):.1f}" cy="{at:.1f}" r="4.5"/>')
        parts += [
            f'<circle class="seed" cx="{x(value):.1f}" cy="{at + 11:.1f}" r="3"><title>{show(value)}</title></circle>'
            for value in values
        ]
        text = f'<text class="value" x="{x(mean):.1f}" y="{at - 11:.1f}" text-anchor="middle">{show(mean)}</text></g>'
        parts.append(text)
    return "".join([*parts, "</svg>"])


def before_after(entries: Sequence[tuple[str, float, float, float, float]]) -> str:
    """Shares before and after with 95% whiskers, one line each: (name, before, its error, after, its error)."""
    width, line, left, right = 660, 54, 92, 56
    height = TOP + line * len(entries) + BOTTOM
    top = max(max(b + 2 * eb, a + 2 * ea) for _, b, eb, a, ea in entries)
    ticks = nice_ticks(0.0, min(1.0, top * 1.02))
    x = _scale(ticks[0], ticks[-1], left, width - right)
    parts = [_open(width, height, "accuracy before and after, with 95% intervals")]
    parts += _vertical_grid(ticks, x, [(TOP, height - BOTTOM)])
    for i, (name, before, before_error, after, after_error) in enumerate(entries):
        middle = TOP + line * (i + 0.5)
        parts.append(_name(left, middle, name))
        for kind, value, error, at in (
            ("before", before, before_error, middle - 9),
            ("after", after, after_error, middle + 9),
        ):
            bar = f'<rect class="bar" x="{left}" y="{at - 7:.1f}" width="{x(value) - left:.1f}" height="14" rx="2"/>'
            title = f"{name}, {kind}: {value:.1%} ± {error:.1%} (standard error)"
            whisker = _share_whisker(x, value, error, at)
            parts.append(f'<g class="{kind}"><title>{escape(title)}</title>{bar}{whisker}</g>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, at least two."""
    magnitude = max(abs(low), abs(high), 1e-12)
    if high - low < 1e-6 * magnitude:
        high = low + (0.1 * magnitude if magnitude > 1e-9 else 1.0)  # all zeros: a grid that its labels can tell apart
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def running_mean(values: Sequence[float], reach: int = 2) -> list[float]:
    """Each value averaged with up to `reach` neighbours on both sides, fewer at the ends."""
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def _axes(
    steps: Sequence[float], low: float, high: float, label: str, show: Callable[[float], str]
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """The frame of a chart over steps: its first elements and its two scales."""
    ticks = nice_ticks(low, high)
    x = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_open(WIDTH, HEIGHT, label)]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{show(tick)}</text>')
    for step in _step_ticks(steps):
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step:g}</text>')
    return parts, x, y


def _vertical_grid(
    ticks: Sequence[float],
    x: Callable[[float], float],
    spans: Sequence[tuple[float, float]],
    show: Callable[[float], str] = "{:.0%}".format,
) -> list[str]:
    """Lines through spans of heights, and values below, of a horizontal axis; percentages if nothing else is said."""
    parts, below = [], spans[-1][1] + BOTTOM - 12
    for tick in ticks:
        at = x(tick)
        for top, bottom in spans:
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{below:.1f}" text-anchor="middle">{show(tick)}</text>')
    return parts


def _whisker(low: float, high: float, at: float, ends: Sequence[float]) -> str:
    """An interval as a line, with a mark at each of `ends`; all in units of the drawing."""
    marks = "".join(
        f'<line class="whisker" x1="{end:.1f}" x2="{end:.1f}" y1="{at - 4:.1f}" y2="{at + 4:.1f}"/>' for end in ends
    )
    return f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>{marks}'


def _share_whisker(x: Callable[[float], float], value: float, error: float, at: float) -> str:
    """The 95% interval of a share, and the share beside it."""
    low, high = x(max(0.0, value - 1.96 * error)), x(min(1.0, value + 1.96 * error))
    text = f'<text class="value" x="{high + 7:.1f}" y="{at + 4:.1f}">{value:.1%}</text>'
    return _whisker(low, high, at, (low, high)) + text


@dataclass(frozen=True)
class _Lines:
    """Where the lines of a chart are.

    Attributes:
        left: the left edge of the chart.
        height: of the drawing.
        names: as drawn.
        middles: of each line.
        spans: top and bottom of what the grid is drawn through.
    """

    left: float
    height: float
    names: list[str]
    middles: list[float]
    spans: list[tuple[float, float]]


def _lines(names: Sequence[str], line: float) -> _Lines:
    """Lines of a height, by name.

    Short names stand to the left of their lines. Where one is long they stand above, broken into several lines of text
    where they must be, so that they never take the room of the chart; the whole name is the tooltip.
    """
    longest = max(map(len, names))
    if longest <= _SHORT:
        left, height = 16.0 + 8 * longest, TOP + line * len(names) + BOTTOM
        middles = [TOP + line * (i + 0.5) for i in range(len(names))]
        drawn = [_name(left, at, name) for name, at in zip(names, middles)]
        return _Lines(left, height, drawn, middles, [(TOP, height - BOTTOM)])
    at, drawn, middles, spans = float(TOP), [], [], []
    for name in names:
        texts = wrap(name, _WIDE, break_on_hyphens=False, max_lines=_MOST, placeholder=" ...") or [""]
        rows = [(at + _LEAD * (row + 1) - 4, escape(text)) for row, text in enumerate(texts)]
        spread = "".join(f'<tspan x="8" y="{y:.1f}">{text}</tspan>' for y, text in rows)
        drawn.append(f'<text class="name">{spread}<title>{escape(name)}</title></text>')
        at += _LEAD * len(texts)
        spans.append((at, at + line))
        middles.append(at + line / 2)
        at += line
    return _Lines(24.0, at + BOTTOM, drawn, middles, spans)


def _name(left: float, at: float, name: str) -> str:
    return f'<text class="name" x="{left - 12}" y="{at + 4:.1f}" text-anchor="end">{escape(name)}</text>'


def _open(width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _points(points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _step_ticks(steps: Sequence[float]) -> list[float]:
    low, high = min(steps), max(steps)
    inside = [t for t in nice_ticks(low, high, 6) if low < t < high and t == int(t)]
    return [low, *(t for t in inside if min(t - low, high - t) > (high - low) * 0.08), *([high] if high > low else [])]
