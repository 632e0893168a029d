"""How many cases a run had, and what share of them had each trait."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

LEAST = 0.2  # of the cases of a long run: of each trait that is asked for


class Tally:
    def __init__(self) -> None:
        self.cases, self.traits = 0, Counter[str]()

    def add(self, traits: Iterable[str]) -> None:
        self.cases += 1
        self.traits.update(traits)

    def hold(self, cases: int, asked: Iterable[str]) -> None:
        """At least so many cases, and enough of each kind."""
        assert self.cases >= cases
        rare = {trait: self.traits[trait] / self.cases for trait in asked if self.traits[trait] < LEAST * self.cases}
        assert not rare, f"too few of {self.cases} cases: {rare}"

    def as_property(self, what: str) -> tuple[str, str]:
        """What a test report carries from a worker to the process that prints."""
        return "fuzzed", json.dumps([what, self.cases, self.traits])


def lines(reports: Iterable[Any]) -> Iterator[str]:
    """Of all reports together, one line for each thing that was fuzzed."""
    cases: Counter[str] = Counter()
    traits: dict[str, Counter[str]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "fuzzed":
                what, number, of = json.loads(value)
                cases[what] += number
                traits.setdefault(what, Counter()).update(of)
    for what, number in sorted(cases.items()):
        shares = ", ".join(f"{trait} {count / number:.0%}" for trait, count in traits[what].most_common())
        yield f"fuzzed {what}: {number:,} cases; {shares}"
