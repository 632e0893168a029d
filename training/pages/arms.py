"""Runs that differ only in their seed, taken together: means, spreads, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.statistics import Spread, spread
from ..evaluation.summary import KINDS
from ..folder import Run
from .formats import interval, points

_FEW = 10  # seeds below which the warning is given


@dataclass
class Arm:
    """One setting, trained from several seeds."""

    name: str
    runs: dict[int, Run] = field(default_factory=dict)  # by seed

    def accuracies(self, kind: str) -> list[float]:
        return [run.result["after"][kind]["accuracy"] for run in self.runs.values()]

    def mean(self, when: str, kind: str, key: str) -> float:
        values = [run.result[when][kind][key] for run in self.runs.values()]
        return sum(values) / len(values)

    def differences(self, base: Arm, kind: str) -> list[float]:
        """Final accuracy minus that of `base`, one number for each seed that both have."""
        pairs = [(base.runs[seed].result, run.result) for seed, run in self.runs.items() if seed in base.runs]
        return [two["after"][kind]["accuracy"] - one["after"][kind]["accuracy"] for one, two in pairs]


def collect_arms(runs: Sequence[Run]) -> tuple[list[Arm], list[Run]]:
    """Collect runs into arms, in order of appearance; the second list holds runs whose arm has their seed already.

    Two runs belong to one arm if their `config.yaml` differ only in `grpo.seed` and the section `output`, and as many
    processes trained them. An arm is named by those of its settings that differ between arms, the mode of credit first.
    """
    flat = [_settings(run) for run in runs]
    kinds: list[dict[str, Any]] = []
    arms: list[Arm] = []
    repeated = []
    for run, settings in zip(runs, flat):
        if settings not in kinds:
            kinds.append(settings)
            arms.append(Arm(""))
        arm = arms[kinds.index(settings)]
        seed = run.config["grpo"]["seed"]
        if seed in arm.runs:
            repeated.append(run)
        arm.runs.setdefault(seed, run)
    keys = list(dict.fromkeys(key for settings in kinds for key in settings))
    differ = [key for key in keys if any(s.get(key, _UNSET) != kinds[0].get(key, _UNSET) for s in kinds)]
    for arm, settings in zip(arms, kinds):
        said = {key: settings.get(key, _UNSET) for key in differ}
        mode = said.pop("rhythm.mode", None)
        parts = [str(mode)] if mode is not None else []
        parts += [f"{key.removeprefix('rhythm.')}={value}" for key, value in said.items()]
        arm.name = ", ".join(parts) or str(settings.get("rhythm.mode", "all"))
    return arms, repeated


_UNSET = "(not set)"


def _settings(run: Run) -> dict[str, Any]:
    """`section.key` to value, without those in which runs of one arm may differ; and how many processes a batch had."""
    sections = {name: keys for name, keys in run.config.items() if name != "output"}
    flat = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    flat.pop("grpo.seed", None)
    flat["processes"] = run.result.get("processes", 1)
    return flat


ARM_HEAD = ["arm", "seeds", "", "before", "after, mean (sd)", "points against the first (se; 95%)", "pairs", "tokens"]


def arm_lines(arms: Sequence[Arm]) -> list[list[str]]:
    """Two lines for each arm, sampled and greedy, under `ARM_HEAD`."""
    lines = []
    for i, arm in enumerate(arms):
        for kind in KINDS:
            found = spread(arm.accuracies(kind))
            gap = arm.differences(arms[0], kind) if i > 0 else []
            lines.append(
                [
                    *([arm.name, " ".join(map(str, arm.runs))] if kind == KINDS[0] else ["", ""]),
                    kind,
                    f"{arm.mean('before', kind, 'accuracy'):.1%}",
                    f"{found.mean:.1%} ({found.deviation * 100:.1f})" if found.count > 1 else f"{found.mean:.1%}",
                    _points(spread(gap)) if gap else "-" if i == 0 else "no seed in common",
                    str(len(gap)) if gap else "",
                    f"{arm.mean('after', kind, 'tokens'):.1f}",
                ]
            )
    return lines


def _points(gap: Spread) -> str:
    known = f" ({gap.error * 100:.1f}; {interval(gap.low, gap.high)})" if gap.count > 1 else ""
    return points(gap.mean) + known


def caution(arms: Sequence[Arm]) -> str:
    """What so few seeds cannot show, in a sentence; empty where there are enough."""
    fewest = min(len(arm.runs) for arm in arms)
    if fewest >= _FEW:
        return ""
    seeds = "1 seed is" if fewest == 1 else f"{fewest} seeds are"
    widest = max(spread(arm.accuracies(kind)).deviation for arm in arms if len(arm.runs) > 1 for kind in KINDS)
    return (
        f"{seeds} few: here runs that differ in nothing but the seed have a standard deviation of up to "
        f"{widest * 100:.1f} points, so a difference of a few points between arms is noise unless its 95% interval "
        "leaves out 0."
    )
