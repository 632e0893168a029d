"""Figures as text, the same in the terminal and on the pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def share(summary: Mapping[str, Any]) -> str:
    """The accuracy of an evaluation's summary and its binomial standard error."""
    return f"{summary['accuracy']:.1%} ± {summary['standard_error']:.1%}"


def estimate(summary: Mapping[str, Any]) -> str:
    """What papers call the accuracy of an evaluation's summary, or how many responses it is of."""
    samples = summary.get("samples", 1)
    if isinstance(samples, int):
        return "pass@1" if samples == 1 else f"avg@{samples}"
    return f"{responses(summary)} each"


def responses(summary: Mapping[str, Any]) -> str:
    """How many responses each instance has in an evaluation's summary."""
    samples = summary.get("samples", 1)
    if isinstance(samples, int):
        return "1 response" if samples == 1 else f"{samples} responses"
    return f"{min(samples)} to {max(samples)} responses"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{difference * 100:+.1f}"


def interval(low: float, high: float) -> str:
    """The ends of an interval of such differences."""
    return f"{points(low)} to {points(high)}"


def size(count: float) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def p_value(p: float) -> str:
    """HTML: three decimals, or the power of ten that a small one is below."""
    if p >= 0.001:
        return f"{p:.3f}"
    exponent = math.floor(math.log10(p)) if p > 0 else -300
    return f"&lt; 10<sup>{exponent + 1}</sup>"


def credit_name(mode: str) -> str:
    return "plain GRPO" if mode == "uniform" else f"GRPO with {mode} credit"


def pack(verdicts: Sequence[Sequence[bool]]) -> str:
    """Verdicts as text, 1 is right: a digit an instance, or with several responses a word an instance, "0110 1111"."""
    words = ["".join("01"[right] for right in some) for some in verdicts]
    return ("" if all(len(word) == 1 for word in words) else " ").join(words)


def unpack(text: str, instances: int) -> list[list[bool]]:
    """The verdicts of which `pack` made a text.

    Raises:
        ValueError: for a text that is none of so many instances.
    """
    words = list(text) if len(text) == instances else text.split(" ")
    if len(words) != instances or not all(words) or not set(text) <= set("01 ") or " " in words:
        raise ValueError(f"it must hold a 0 or 1 for each response to {instances} instances")
    return [[digit == "1" for digit in word] for word in words]


def ranges(indices: Sequence[int]) -> str:
    """Rising indices as text: "0-29 35"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def indices_of(text: str, count: int) -> list[int]:
    """The indices of which `ranges` made a text.

    Raises:
        ValueError: for a text that is none of indices below `count`.
    """
    ends = [[int(end) for end in part.split("-")] for part in text.split()]
    if any(len(end) > 2 or not 0 <= end[0] <= end[-1] < count for end in ends):
        raise ValueError(f"it must hold ranges of numbers below {count}, got {text!r}")
    return [i for end in ends for i in range(end[0], end[-1] + 1)]
