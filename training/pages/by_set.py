"""Several runs or arms by test set, by mean of sets, and by pass@k: the tables of `compare` beyond one accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluation.statistics import PairedDifference, paired_difference, spread
from ..evaluation.summary import KINDS, MEAN_OF_SETS, mean_difference
from ..folder import Run
from .formats import estimate, indices_of, interval, points, share, unpack

Group = tuple[str, Mapping[int, Run]]  # a name, and its runs by seed: one run, or an arm's
Lines = list[list[str]]


def answers(run: Run, kind: str) -> list[float]:
    """Of each instance, the share of the final model's responses that are right."""
    found = run.result["after"][kind]
    return [sum(some) / len(some) for some in unpack(found["right"], found["instances"])]


def against(base: Run, run: Run, kind: str) -> PairedDifference:
    """How the final model of `run` differs from that of `base`, instance by instance."""
    return paired_difference(answers(base, kind), answers(run, kind))


def sets_of(run: Run) -> dict[str, list[int]]:
    """Indices of the instances of each test set; empty where there are fewer than two."""
    count = run.result["after"][KINDS[0]]["instances"]
    return {name: indices_of(text, count) for name, text in run.result.get("sets", {}).items()}


def set_lines(groups: Sequence[Group]) -> Lines:
    """A head, then two lines for each group, sampled and greedy: accuracy in each test set, the mean of sets, and what
    that is against the first group's. No line where there are no test sets.
    """
    base = next(iter(groups[0][1].values()))
    if not sets_of(base) or any(sets_of(run) != sets_of(base) for _, runs in groups for run in runs.values()):
        return []
    after = base.result["after"][KINDS[0]]
    names = [f"{name}, {estimate(after['sets'][name])}" for name in sets_of(base)]
    lines = [["", "", *names, MEAN_OF_SETS, "points against the first"]]
    for i, (name, runs) in enumerate(groups):
        for kind in KINDS:
            found = [run.result["after"][kind] for run in runs.values()]
            cells = [_mean([one["sets"][part] for one in found]) for part in sets_of(base)]
            cells.append(_mean([one["mean_of_sets"] for one in found]))
            gap = _gap(groups[0][1], runs, kind) if i else "-"
            lines.append([name if kind == KINDS[0] else "", kind, *cells, gap])
    return lines


def pass_lines(groups: Sequence[Group]) -> Lines:
    """A head, then a line for each group: pass@k of the sampled responses. No line where each question has one."""
    base = next(iter(groups[0][1].values()))
    every = [run.result["after"][KINDS[0]].get("pass", {}) for _, runs in groups for run in runs.values()]
    shared = [k for k in every[0] if all(k in one for one in every)]
    if len(shared) < 2:
        return []
    lines = [[f"sampled, {estimate(base.result['after'][KINDS[0]])}", *(f"pass@{k}" for k in shared)]]
    for name, runs in groups:
        found = [run.result["after"][KINDS[0]]["pass"] for run in runs.values()]
        lines.append(
            [name, *(_mean([{"accuracy": one[k]["value"]} | one[k] for one in found], _passed) for k in shared)]
        )
    return lines


def _passed(one: Mapping[str, Any]) -> str:
    return f"{one['accuracy']:.1%}"


def _mean(summaries: Sequence[Mapping[str, Any]], show: Callable[[Any], str] = share) -> str:
    """One accuracy with its own error, or the mean over seeds with their standard deviation."""
    if len(summaries) == 1:
        return show(summaries[0])
    found = spread([summary["accuracy"] for summary in summaries])
    return f"{found.mean:.1%} ({found.deviation * 100:.1f})"


def _gap(base: Mapping[int, Run], runs: Mapping[int, Run], kind: str) -> str:
    """The difference of the means of sets: of two runs paired by instance, of two arms paired by seed."""
    if len(base) == len(runs) == 1:
        (one,), (two,) = base.values(), runs.values()
        before, after = answers(one, kind), answers(two, kind)
        members = sets_of(one).values()
        parts = [paired_difference([before[i] for i in of], [after[i] for i in of]) for of in members]
        moved = mean_difference(parts)
        return f"{points(moved['difference'])} ({interval(moved['low'], moved['high'])})"
    pairs = [(_mean_of_sets(base[seed], kind), _mean_of_sets(run, kind)) for seed, run in runs.items() if seed in base]
    if not pairs:
        return "no seed in common"
    found = spread([two - one for one, two in pairs])
    return points(found.mean) + (f" ({interval(found.low, found.high)})" if found.count > 1 else "")


def _mean_of_sets(run: Run, kind: str) -> float:
    return run.result["after"][kind]["mean_of_sets"]["accuracy"]
