"""Runs and arms by test set: tables by hand, and `compare` of runs whose questions were answered several times."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from training.__main__ import main
from training.evaluation.accuracies import change_lines, lines_of
from training.evaluation.accuracies import pass_lines as passes_of
from training.evaluation.statistics import paired_difference, spread
from training.evaluation.summary import Evaluation, Response, differences
from training.folder import read_run
from training.pages.by_set import against, pass_lines, set_lines
from training.pages.formats import indices_of, pack, ranges, unpack
from training.pages.report import write_report

from .runs import leave

SETS = {"aime": (4, 4), "amc": (6, 1)}  # instances, and responses to each


def evaluation(chance, seed, greedy=False, sets=SETS):
    """An evaluation whose answers are right by chance."""
    random, responses, names = Random(seed), [], []
    for name, (count, samples) in sets.items():
        for _ in range(count):
            i = len(names)
            names.append(name)
            for sample in range(1 if greedy else samples):
                rewards = {"correctness": float(random.random() < chance)}
                responses.append(Response(i, sample, "x", 10 + sample, sample % 2 == 0, rewards))
    return Evaluation(responses, names if len(sets) > 1 else [], seconds=1.5)


def leave_sets(folder, mode, seed, chance, sets=SETS):
    """A finished run with test sets, as `train` writes it."""
    leave(folder, mode, seed, 50)
    result = json.loads((folder / "result.json").read_text())
    found = {
        when: {
            kind: evaluation(p, 7 * seed + at, kind == "greedy", sets) for at, kind in enumerate(("sampled", "greedy"))
        }
        for when, p in (("before", 0.3), ("after", chance))
    }
    result |= {when: {kind: e.summary() for kind, e in both.items()} for when, both in found.items()}
    result["difference"] = {kind: differences(found["before"][kind], found["after"][kind]) for kind in found["before"]}
    members = found["after"]["sampled"].by_set()
    result["sets"] = {name: ranges(of) for name, of in members.items()} if len(members) > 1 else {}
    result |= {"name": folder.name, "task": "maths", "steps": 3, "parameters": 5, "versions": {}, "examples": []}
    result |= {"questions": "abc", "remark": "", "cost": {}, "seconds": {"training": 60.0, "total": 90.0}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize(
    ("verdicts", "text"),
    [
        ([[True], [False], [True]], "101"),
        ([[True, False], [False, False]], "10 00"),
        ([[True, False, True], [False]], "101 0"),
        ([[True, False]], "10"),
        ([[True]], "1"),
    ],
)
def test_verdicts_as_text(verdicts, text):
    assert pack(verdicts) == text
    assert unpack(text, len(verdicts)) == verdicts


@pytest.mark.parametrize(
    ("text", "instances"), [("", 1), ("12", 2), ("10 ", 2), ("1 0", 3), ("10", 3), ("1  0", 2), ("x", 1)]
)
def test_what_is_no_verdict(text, instances):
    with pytest.raises(ValueError, match="a 0 or 1 for each response"):
        unpack(text, instances)


def test_indices_as_text():
    for indices, text in (([0, 1, 2, 5], "0-2 5"), ([], ""), ([3], "3"), ([0, 2, 3], "0 2-3")):
        assert ranges(indices) == text
        assert indices_of(text, 9) == indices
    for text in ("0-9", "9", "-1", "3-1", "0-1-2", "x", "1,2"):
        with pytest.raises(ValueError):
            indices_of(text, 9)


def test_summary_by_hand():
    right = {0: [1, 0, 1, 1], 1: [0, 0, 0, 0], 2: [1], 3: [0], 4: [1]}
    responses = [
        Response(i, s, "", 10, s > 0, {"correctness": float(x)})
        for i, some in right.items()
        for s, x in enumerate(some)
    ]
    found = Evaluation(responses, ["a", "a", "b", "b", "b"], seconds=2.0).summary()
    assert found["accuracy"] == pytest.approx((0.75 + 0 + 1 + 0 + 1) / 5)
    assert found["samples"] == [1, 4]
    assert found["right"] == "1011 0000 1 0 1"
    assert found["cut_off"] == 5 / 11
    assert found["sets"]["a"]["accuracy"] == 0.375
    assert found["sets"]["a"]["pass"]["2"]["value"] == pytest.approx((1 + 0) / 2)  # only one of four is wrong
    assert found["sets"]["b"]["accuracy"] == pytest.approx(2 / 3)
    assert found["mean_of_sets"]["accuracy"] == pytest.approx((0.375 + 2 / 3) / 2)
    error_a, error_b = 0.375 / 2**0.5, (2 / 9 / 3) ** 0.5
    assert found["mean_of_sets"]["standard_error"] == pytest.approx((error_a**2 + error_b**2) ** 0.5 / 2)
    assert found["mean_of_sets"]["low"] < found["mean_of_sets"]["accuracy"] < found["mean_of_sets"]["high"]
    assert "sets" not in Evaluation(responses, ["a"] * 5).summary()


def test_differences_by_hand():
    before, after = evaluation(0.3, 1), evaluation(0.6, 2)
    found = differences(before, after)
    assert found["difference"] == pytest.approx(after.summary()["accuracy"] - before.summary()["accuracy"])
    aime = paired_difference(before.shares[:4], after.shares[:4])
    assert found["sets"]["aime"]["p_value"] == aime.p_value
    parts = [found["sets"][name] for name in SETS]
    assert found["mean_of_sets"]["difference"] == pytest.approx(sum(p["difference"] for p in parts) / 2)
    reach = sum(((p["high"] - p["low"]) / 2) ** 2 for p in parts) ** 0.5 / 2
    assert found["mean_of_sets"]["high"] - found["mean_of_sets"]["difference"] == pytest.approx(reach)


def test_two_runs_by_set(tmp_path):
    runs = [
        read_run(leave_sets(tmp_path / name, "uniform", seed, p)) for name, seed, p in (("a", 0, 0.3), ("b", 1, 0.7))
    ]
    head, *lines = set_lines([(name, {run.result["seed"]: run}) for name, run in zip("ab", runs)])
    assert head == ["", "", "aime, avg@4", "amc, pass@1", "mean of sets", "points against the first"]
    assert [line[:2] for line in lines] == [["a", "sampled"], ["", "greedy"], ["b", "sampled"], ["", "greedy"]]
    found = [run.result["after"]["sampled"] for run in runs]
    amc = found[1]["sets"]["amc"]
    assert lines[2][3] == f"{amc['accuracy']:.1%} ± {amc['standard_error']:.1%}"
    gap = 100 * (found[1]["mean_of_sets"]["accuracy"] - found[0]["mean_of_sets"]["accuracy"])
    assert lines[2][5].startswith(f"{gap:+.1f} (") and lines[0][5] == "-"
    whole = against(*runs, "sampled").difference
    assert whole == pytest.approx(found[1]["accuracy"] - found[0]["accuracy"])


def test_runs_without_sets_beside_some_with(tmp_path, capsys):
    one, two = (leave_sets(tmp_path / name, "uniform", 0, 0.5) for name in ("one", "two"))
    result = json.loads((two / "result.json").read_text())
    del result["sets"], result["after"]["sampled"]["sets"]
    (two / "result.json").write_text(json.dumps(result))
    assert main(["compare", str(one), str(two), "--output", str(tmp_path / "page.html")]) == 0
    assert "mean of sets" not in capsys.readouterr().out


def test_arms_by_set(tmp_path):
    chances = {"uniform": 0.4, "coupled": 0.7}
    groups = [
        (mode, {seed: read_run(leave_sets(tmp_path / f"{mode}{seed}", mode, seed, p + seed / 20)) for seed in range(3)})
        for mode, p in chances.items()
    ]
    _, *lines = set_lines(groups)
    one, two = ([run.result["after"]["sampled"] for run in runs.values()] for _, runs in groups)
    values = spread([found["sets"]["aime"]["accuracy"] for found in two])
    assert lines[2][:3] == ["coupled", "sampled", f"{values.mean:.1%} ({100 * values.deviation:.1f})"]
    gap = spread([b["mean_of_sets"]["accuracy"] - a["mean_of_sets"]["accuracy"] for a, b in zip(one, two)])
    assert lines[2][5] == f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    del groups[1][1][0], groups[1][1][1], groups[0][1][2]
    assert set_lines(groups)[3][5] == "no seed in common"


def test_pass_at_k_of_arms(tmp_path):
    few = {"": (8, 4)}
    groups = [
        (mode, {seed: read_run(leave_sets(tmp_path / f"{mode}{seed}", mode, seed, 0.5, few)) for seed in range(2)})
        for mode in ("uniform", "coupled")
    ]
    assert set_lines(groups) == []
    head, *lines = pass_lines(groups)
    assert head == ["sampled, avg@4", "pass@1", "pass@2", "pass@4"]
    values = [run.result["after"]["sampled"]["pass"]["4"]["value"] for run in groups[1][1].values()]
    assert lines[1][0] == "coupled" and lines[1][3] == f"{sum(values) / 2:.1%} ({100 * spread(values).deviation:.1f})"
    once = read_run(leave_sets(tmp_path / "once", "uniform", 0, 0.5, {"": (8, 1)}))
    assert pass_lines([("once", {0: once})]) == []


def test_the_commands_page_and_the_report(tmp_path, capsys):
    folders = [leave_sets(tmp_path / f"{m}-{s}", m, s, 0.5) for m in ("uniform", "coupled") for s in range(3)]
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, folders), "--output", str(page)]) == 0
    printed, text = capsys.readouterr().out, page.read_text()
    assert re.search(r"aime, avg@4 +amc, pass@1 +mean of sets +points against the first", printed)
    assert "<h2>Test sets</h2>" in text and "each set counts alike" in text
    assert "1 to 4 responses to each sampled and one greedy" in text
    assert "<h1>2 arms from 6 runs</h1>" in text and "<title>2 arms from 6 runs</title>" in text
    assert "Several responses" not in text  # amc has one each
    report = write_report(folders[4]).read_text()
    result = json.loads((folders[4] / "result.json").read_text())
    for line in (*change_lines(result, "sampled"), *change_lines(result, "greedy")):
        for cell in line:
            assert cell in report
    assert passes_of(result, "sampled") == []
    assert "questions are answered rightly more often than before" in report
    assert "the exact sign-flip test" in report and "McNemar" not in report
    assert "The mean of the 2 test sets" in report
    assert len(lines_of(result["after"])) == 8
    few = leave_sets(tmp_path / "few", "uniform", 0, 0.5, {"": (8, 4)})
    assert "pass@4" in write_report(few).read_text()


def test_other_questions_are_refused_by_what_differs(tmp_path, capsys):
    one, two = (leave_sets(tmp_path / name, "uniform", 0, 0.5) for name in ("one", "two"))
    words = ["compare", str(one), str(two), "--output", str(tmp_path / "page.html")]
    assert main(words) == 0
    result = json.loads((two / "result.json").read_text()) | {"questions": "other"}
    (two / "result.json").write_text(json.dumps(result))
    capsys.readouterr()
    assert main(words) == 2
    assert f"{two}: evaluated on other instances than {one}, though the settings of the task are the same" in (
        capsys.readouterr().err
    )
    config = (two / "config.yaml").read_text().replace("level: tiny", "level: paper")
    (two / "config.yaml").write_text(config)
    assert main(words) == 2
    assert f"{two}: evaluated on task.level paper; {one} on task.level tiny" in capsys.readouterr().err
    # settings that change no question, such as the words they are asked in, do not matter where the questions are known
    (two / "result.json").write_text(json.dumps(result | {"questions": "abc"}))
    assert main(words) == 0


@pytest.mark.parametrize("name", ["sets", "sets.aime", "after.sampled.samples", "after.sampled.pass", "questions"])
@pytest.mark.parametrize("value", [5, None, [], {}, "x", ["x"], {"1": 3}, "0-99999999999"])
def test_a_result_by_another_hand(tmp_path, capsys, name, value):
    """One value of it is something else: one line says so, or the runs are compared."""
    one, two = (leave_sets(tmp_path / folder, "uniform", 0, 0.5) for folder in ("one", "two"))
    result = json.loads((two / "result.json").read_text())
    *path, last = name.split(".")
    inner = result
    for key in path:
        inner = inner[key]
    inner[last] = value
    (two / "result.json").write_text(json.dumps(result))
    status = main(["compare", str(two), str(one), "--output", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    if status == 0:
        assert (name, value) in (("sets", {}), ("after.sampled.pass", {}), ("after.sampled.samples", 5))
    else:
        assert status == 2 and error.startswith(f"error: {two if name != 'questions' else one}: ")
        assert error.count("\n") == 1
