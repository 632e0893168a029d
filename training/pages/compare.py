"""`compare`: several runs side by side, paired by instance and by seed, in the terminal and as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.accuracies import aligned
from ..evaluation.statistics import spread
from ..evaluation.summary import KINDS
from ..folder import MODEL, Run, read_run, write_text
from ..recipe import Eval, Grpo, RecipeError
from .arms import ARM_HEAD, Arm, arm_lines, caution, collect_arms
from .by_set import Group, against, pass_lines, set_lines
from .charts import curves, forest, strip
from .formats import interval, points, responses, share
from .report import CURVES, figures, page, section, table


def compare_runs(folders: Sequence[Path], output: Path) -> Path:
    """Compare the final models of runs with that of the first; prints a table and writes a page.

    Where several runs differ in nothing but their seed, they are taken together as an arm, and arms are compared with
    the first run's arm, paired by seed.

    Raises:
        RecipeError: where a folder holds no finished run, or runs were evaluated on different instances.
    """
    runs = [read_run(folder) for folder in folders]
    base = runs[0]
    for run in runs[1:]:
        if said := _other_questions(base, run):
            raise RecipeError(said)
    arms, repeated = collect_arms(runs)
    if all(len(arm.runs) == 1 for arm in arms):
        arms = []
    notes = _notes(runs, arms, repeated)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and not output.is_file():  # /dev/null and other pipes are written to, not replaced
        output.write_text(_page(runs, arms, notes), encoding="utf-8")
    else:
        write_text(output.resolve(), _page(runs, arms, notes))
    if arms:
        tables = [[_SHORT_HEAD, *_short_lines(runs)], [ARM_HEAD, *arm_lines(arms)]]
    else:
        tables = [[_HEAD, *_run_lines(runs)]]
    tables += [lines for lines in _further(runs, arms) if lines]
    print("\n\n".join(map(_text, tables)))
    print(*notes, f"\n  page     {output}", sep="\n")
    return output


def _other_questions(base: Run, run: Run) -> str:
    """How the instances that two runs were evaluated on differ, in words; empty where they are the same."""
    asked = [{"split": r.result["split"], "instances": _instances(r)} for r in (base, run)]
    known = [r.result.get("questions") for r in (base, run)]
    if asked[0] == asked[1] and known[0] == known[1] is not None:
        return ""
    for r, found in zip((base, run), asked):
        task = {f"task.{key}": value for key, value in r.config["task"].items() if key not in ("train_size", "prompt")}
        found |= task
    keys = [key for key in dict.fromkeys([*asked[0], *asked[1]]) if asked[0].get(key) != asked[1].get(key)]
    one, two = (", ".join(f"{key} {found.get(key)}" for key in keys) for found in asked)
    if keys:
        return f"{run.folder}: evaluated on {two}; {base.folder} on {one}"
    if known[0] != known[1]:
        return (
            f"{run.folder}: evaluated on other instances than {base.folder}, though the settings of the task are the "
            "same: its data changed between them"
        )
    return ""


def _instances(run: Run) -> int:
    return run.result["after"]["sampled"]["instances"]


def _further(runs: Sequence[Run], arms: Sequence[Arm]) -> list[list[list[str]]]:
    """Tables by test set and by pass@k, each with its head; empty where there is nothing to say."""
    groups: list[Group] = [(arm.name, arm.runs) for arm in arms]
    groups = groups or [(str(run.folder), {run.result["seed"]: run}) for run in runs]
    return [set_lines(groups), pass_lines(groups)]


_HEAD = ["run", "mode", "seed", "", "before", "after", "against the first", "tokens", "minutes"]


def _run_lines(runs: Sequence[Run]) -> list[list[str]]:
    """Two lines for each run, sampled and greedy, under `_HEAD`."""
    lines = []
    for i, run in enumerate(runs):
        result = run.result
        for kind in KINDS:
            before, after = result["before"][kind], result["after"][kind]
            change = against(runs[0], run, kind)
            moved = f"{points(change.difference)} ({interval(change.low, change.high)})"
            name = [str(run.folder), result["mode"], str(result["seed"])] if kind == "sampled" else ["", "", ""]
            lines.append(
                [
                    *name,
                    kind,
                    f"{before['accuracy']:.1%}",
                    share(after),
                    moved if i > 0 else "-",
                    f"{after['tokens']:.0f}",
                    f"{result['seconds']['training'] / 60:.1f}" if kind == "sampled" else "",
                ]
            )
    return lines


_SHORT_HEAD = ["run", "mode", "seed", *KINDS, "tokens", "minutes"]


def _short_lines(runs: Sequence[Run]) -> list[list[str]]:
    """One line for each run, under `_SHORT_HEAD`, where the table of arms holds the comparison."""
    return [
        [
            str(run.folder),
            run.result["mode"],
            str(run.result["seed"]),
            *(f"{run.result['after'][kind]['accuracy']:.1%}" for kind in KINDS),
            f"{run.result['after']['sampled']['tokens']:.0f}",
            f"{run.result['seconds']['training'] / 60:.1f}",
        ]
        for run in runs
    ]


def _notes(runs: Sequence[Run], arms: Sequence[Arm], repeated: Sequence[Run]) -> list[str]:
    """Sentences about what this comparison leaves out or cannot show."""
    notes = [caution(arms)] if arms else []
    if arms and repeated:
        names = ", ".join(str(run.folder) for run in repeated)
        notes.append(f"Left out of the arms, which have these seeds already: {names}.")
    base = runs[0].result["before"]["greedy"]["right"]
    others = [str(run.folder) for run in runs if run.result["before"]["greedy"]["right"] != base]
    if others:
        notes.append(f"Not started from the model that {runs[0].folder} started from: {', '.join(others)}.")
    for run in () if arms else runs[1:]:  # an arm's name says it
        one, two = map(_decoding, (runs[0], run))
        if said := [f"{key} {value}, not {one[key]}" for key, value in two.items() if value != one[key]]:
            notes.append(f"Evaluated otherwise than {runs[0].folder}: {run.folder} ({', '.join(said)}).")
    if unsaved := [str(run.folder) for run in runs if not (run.folder / MODEL).is_dir()]:
        notes.append(f"Measured, but ended before its model was saved: {', '.join(unsaved)}.")
    return [note for note in notes if note]


def _decoding(run: Run) -> dict[str, Any]:
    """What decides an accuracy besides the model and the questions."""
    given, grpo = run.config["eval"], run.config["grpo"]
    found = {f"eval.{key}": given.get(key, getattr(Eval, key)) for key in ("samples", "temperature", "top_p", "top_k")}
    longest = given.get("max_tokens") or grpo.get("max_completion_length", Grpo.max_completion_length)
    return found | {"eval.max_tokens": longest}


def _text(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    texts = aligned(lines)
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def _page(runs: Sequence[Run], arms: Sequence[Arm], notes: Sequence[str]) -> str:
    title = f"{len(arms)} arms from {len(runs)} runs" if arms else f"{len(runs)} runs compared"
    warnings = "".join(f'<p class="wrong">{escape(note)}</p>' for note in notes)
    body = f"<header><p class='kicker'>rhythm-kernels</p><h1>{escape(title)}</h1></header>"
    if arms:
        body += section("Arms", _arm_charts(arms, runs[0]) + warnings)
    else:
        body += section("Final models", _run_charts(runs) + warnings)
    for (heading, note), lines in zip(_FURTHER.items(), _further(runs, arms)):
        if lines:
            body += section(heading, table(*_escaped([lines[0]]), _escaped(lines[1:])) + f'<p class="note">{note}</p>')
    if arms:
        body += section("Runs", table(_SHORT_HEAD, _escaped(_short_lines(runs))))
    return page(title, body + section("Learning", _learning(runs, arms)))


_FURTHER = {
    "Test sets": (
        "In the mean of sets each set counts alike, however many instances it has. Over several seeds: "
        "mean (standard deviation); otherwise ± is one standard error. Differences are those of the mean of sets, "
        "paired by seed where there are several, otherwise by instance, with 95% intervals."
    ),
    "Several responses": (
        "pass@k is the chance that at least one of k responses is right, estimated without bias from "
        "all of them. Over several seeds: mean (standard deviation). Each run's report has the 95% intervals."
    ),
}


def _short_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders without what all of them begin with."""
    folders = [run.folder.absolute() for run in runs]
    top = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(top)) for folder in folders]


def _escaped(lines: list[list[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in line] for line in lines]


def _questions(run: Run) -> str:
    split = escape(run.result["split"])
    return f"{_instances(run)} instances of the {split} split, {_answered(run)} by each final model. "


def _answered(run: Run) -> str:
    found = run.result["after"][KINDS[0]]
    return "answered once" if found.get("samples", 1) == 1 else f"{responses(found)} to each sampled and one greedy"


def _run_charts(runs: Sequence[Run]) -> str:
    note = _questions(runs[0]) + (
        "± is one standard error over instances. Differences are paired by instance, with 95% intervals; they say how "
        "sure the two models differ, not how sure the two methods do: for that, train several seeds of each."
    )
    bars = {
        kind: forest(
            [
                (name, r.result["after"][kind]["accuracy"], r.result["after"][kind]["standard_error"])
                for name, r in zip(_short_names(runs), runs)
            ]
        )
        for kind in KINDS
    }
    return f'{figures(bars)}{table(_HEAD, _escaped(_run_lines(runs)))}<p class="note">{note}</p>'


def _arm_charts(arms: Sequence[Arm], run: Run) -> str:
    note = _questions(run) + (
        "A ring is one seed, the dot the mean, the whisker the 95% interval of the mean over seeds "
        "(Student's t). sd is the standard deviation over seeds. Differences are paired by seed, which sets the order "
        "of the data: mean, its standard error (se) and its 95% interval over the seeds that both arms have."
    )
    drawn = {}
    for kind in KINDS:
        found = [(arm.name, arm.accuracies(kind)) for arm in arms]
        drawn[f"{kind}, accuracy"] = strip(
            [(name, values, *_interval(values)) for name, values in found],
            label=f"{kind} accuracy by arm, a ring a seed",
            show="{:.1%}".format,
            tick=lambda share: f"{100 * share:g}%",
        )
    for kind in KINDS:
        gaps = [(arm.name, [100 * d for d in arm.differences(arms[0], kind)]) for arm in arms]
        entries = [(name, values, *_interval(values)) if values else None for name, values in gaps]
        if any(entry is not None for entry in entries[1:]):
            drawn[f"{kind}, points against {escape(arms[0].name)}, paired by seed"] = strip(
                [None, *entries[1:]],
                label=f"{kind} accuracy against {arms[0].name}, a ring a seed",
                show="{:+.1f}".format,
                tick=lambda points: f"{points:+g}" if points else "0",
                zero=True,
            )
    return f'{figures(drawn)}{table(ARM_HEAD, _escaped(arm_lines(arms)))}<p class="note">{note}</p>'


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and the ends of its interval, which are the mean too where there is one value."""
    found = spread(values)
    return (found.mean, found.low, found.high) if found.count > 1 else (found.mean, found.mean, found.mean)


def _learning(runs: Sequence[Run], arms: Sequence[Arm]) -> str:
    """Training curves: a line for each run, or for each arm the mean over its seeds at the steps that all have."""
    sets = [(arm.name, list(arm.runs.values())) for arm in arms] or [
        (name, [run]) for name, run in zip(_short_names(runs), runs)
    ]
    names = [name for name, _ in sets]
    charts = {}
    for key in ("accuracy", "response_tokens", "entropy"):
        series = []
        for _, members in sets:
            found = [run.series(key) for run in members]
            steps = sorted(set.intersection(*map(set, found)))
            series.append([(step, sum(f[step] for f in found) / len(found)) for step in steps])
        if any(series):
            caption, show = CURVES[key]
            charts[caption] = curves(series, names, label=caption, show=show)
    key_list = "".join(f'<li class="s{i % 5}">{escape(name)}</li>' for i, name in enumerate(names))
    note = "A line is a running mean of five steps" + (" of the mean over an arm's seeds." if arms else ".")
    return f'<ul class="key">{key_list}</ul>{figures(charts)}<p class="note">{note}</p>' if charts else ""
