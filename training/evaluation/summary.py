"""What an evaluation found: the responses, and the figures that are made of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..pages.formats import pack
from ..task import CORRECTNESS, Figure, Instance
from .estimators import bootstrap, pass_estimates
from .statistics import Z95, PairedDifference, mean_error, paired_difference

KINDS = ("sampled", "greedy")
MEAN_OF_SETS = "mean of sets"


@dataclass
class Response:
    """One response to an instance.

    Attributes:
        instance: the index of its instance.
        sample: which of the responses to that instance it is, from 0.
        text: without special tokens.
        length: tokens, the end token included where it has one.
        finished: whether it ended by itself; the others were cut off at the limit.
        rewards: of the task, by name; correctness is among them.
        tokens: themselves; empty where the response was read from a file.
    """

    instance: int
    sample: int
    text: str
    length: int
    finished: bool
    rewards: dict[str, float]
    tokens: list[int] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return self.rewards[CORRECTNESS] == 1.0


@dataclass
class Evaluation:
    """Responses to every instance, one or several each.

    Attributes:
        responses: by instance, and by sample within an instance.
        sets: the test set of each instance; empty where the task has none.
        figures: what the responses are made of, by the task.
        seconds: how long it took.
    """

    responses: list[Response]
    sets: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._of: dict[int, list[Response]] = {}
        for response in self.responses:
            self._of.setdefault(response.instance, []).append(response)

    @property
    def first(self) -> list[Response]:
        """The first response to each instance."""
        return [self._of[i][0] for i in range(len(self._of))]

    @property
    def verdicts(self) -> list[list[bool]]:
        """Of each instance, which of its responses are right."""
        return [self._right(i) for i in range(len(self._of))]

    @property
    def shares(self) -> list[float]:
        """Of each instance, the share of its responses that are right."""
        return shares(self.verdicts)

    def by_set(self) -> dict[str, list[int]]:
        """Indices of the instances of each test set, in order of appearance; of one called "" where there are none."""
        found: dict[str, list[int]] = {}
        for i in range(len(self._of)):
            found.setdefault(self.sets[i] if self.sets else "", []).append(i)
        return found

    def summary(self) -> dict[str, Any]:
        """Shares and means, ready for JSON; `right` says of every response whether it is right, for paired comparisons.

        With several test sets, `sets` has the same figures of each, and `mean_of_sets` their mean, each set counting
        alike; the other figures are of all instances together.
        """
        members = self.by_set()
        result = self._figures(members)
        result["seconds"] = round(self.seconds, 2)
        result["right"] = pack(self.verdicts)
        if self.figures:
            result["figures"] = {name: asdict(figure) for name, figure in self.figures.items()}
        if len(members) > 1:
            result["sets"] = {name: self._figures({name: of}) for name, of in members.items()}
            result["mean_of_sets"] = self._mean_of_sets(members)
        return result

    def _figures(self, members: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The figures of all instances of some test sets."""
        verdicts = {name: [self._right(i) for i in of] for name, of in members.items()}
        every = sorted(i for of in members.values() for i in of)
        means = shares([self._right(i) for i in every])
        counts = sorted({len(self._of[i]) for i in every})
        responses = [response for i in every for response in self._of[i]]
        passes = pass_estimates({name: [(len(v), sum(v)) for v in some] for name, some in verdicts.items()})
        return {
            "instances": len(every),
            "samples": counts[0] if len(counts) == 1 else counts,
            "accuracy": math.fsum(means) / len(means),
            "standard_error": mean_error(means),
            "tokens": sum(response.length for response in responses) / len(responses),
            "cut_off": sum(not response.finished for response in responses) / len(responses),
            "pass": {str(k): estimate.to_dict() for k, estimate in passes.items()},
        }

    def _mean_of_sets(self, members: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Each set's accuracy over all its samples, averaged, as papers do that sample the small sets more often."""
        means = [shares([self._right(i) for i in of]) for of in members.values()]
        found = bootstrap([[[value] for value in some] for some in means], [1 / len(means)] * len(means))[0]
        return {
            "accuracy": math.fsum(math.fsum(some) / len(some) for some in means) / len(means),
            "standard_error": math.sqrt(math.fsum(mean_error(some) ** 2 for some in means)) / len(means),
            "low": found.low,
            "high": found.high,
        }

    def _right(self, instance: int) -> list[bool]:
        return [response.correct for response in self._of[instance]]


def shares(verdicts: Sequence[Sequence[bool]]) -> list[float]:
    """Of each instance, the share of its responses that are right."""
    return [sum(some) / len(some) for some in verdicts]


def differences(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """How two evaluations of the same instances differ, paired by instance, ready for JSON; by test set if several."""
    one, two, members = before.shares, after.shares, before.by_set()
    result = asdict(paired_difference(one, two))
    if len(members) > 1:
        by_set = {name: paired_difference([one[i] for i in of], [two[i] for i in of]) for name, of in members.items()}
        result["sets"] = {name: asdict(change) for name, change in by_set.items()}
        result["mean_of_sets"] = mean_difference(list(by_set.values()))
    return result


def mean_difference(by_set: Sequence[PairedDifference]) -> dict[str, float]:
    """The mean of the differences of test sets, each counting alike, with the interval that follows from theirs."""
    difference = math.fsum(change.difference for change in by_set) / len(by_set)
    errors = [(change.high - change.low) / (2 * Z95) for change in by_set]
    reach = Z95 * math.sqrt(math.fsum(error**2 for error in errors)) / len(by_set)
    return {"difference": difference, "low": difference - reach, "high": difference + reach}


def questions(instances: Sequence[Instance]) -> str:
    """A name for the instances evaluated: two lists have the same one only if they are the same."""
    return digest(instances)


def digest(value: Any) -> str:
    """A short hash of a value of JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
