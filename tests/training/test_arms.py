"""Seeds taken together: which runs make an arm, its figures by hand, the page, and the Makefile's loop."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from xml.etree import ElementTree

import pytest

from training.__main__ import main
from training.folder import read_run
from training.pages.arms import arm_lines, caution, collect_arms
from training.pages.report import _curves
from training.recipe import ROOT

from .runs import leave

FIGURES = {"uniform": {0: 44, 1: 46, 2: 42}, "coupled": {0: 45, 1: 45, 2: 48, 3: 60}}


@pytest.fixture
def folders(tmp_path):
    return [leave(tmp_path / f"{m}-{s}", m, s, right) for m, by in FIGURES.items() for s, right in by.items()]


def test_arms_by_hand(folders):
    arms, repeated = collect_arms([read_run(folder) for folder in folders])
    assert [(arm.name, list(arm.runs)) for arm in arms] == [("uniform", [0, 1, 2]), ("coupled", [0, 1, 2, 3])]
    assert repeated == []
    assert arms[1].differences(arms[0], "sampled") == pytest.approx([0.01, -0.01, 0.06])
    lines = arm_lines(arms)
    assert lines[0] == ["uniform", "0 1 2", "sampled", "30.0%", "44.0% (2.0)", "-", "", "71.0"]
    # 45, 45, 48, 60: mean 49.5, sd sqrt((20.25 + 20.25 + 2.25 + 110.25) / 3) = 7.14. Paired 1, -1, 6: mean 2,
    # sd sqrt((1 + 9 + 16) / 2) = 3.606, error 2.082, 4.3027 times that is 8.957
    assert lines[2][:6] == ["coupled", "0 1 2 3", "sampled", "30.0%", "49.5% (7.1)", "+2.0 (2.1; -7.0 to +11.0)"]
    assert lines[3][2:4] == ["greedy", "40.0%"]
    assert lines[2][6:] == ["3", "71.5"]
    assert caution(arms).startswith("3 seeds are few: ")
    assert "standard deviation of up to 7.1 points" in caution(arms)


def test_batches_of_more_processes_are_another_arm(folders):
    runs = [read_run(folder) for folder in folders[:2]]
    runs[1].result["processes"] = 2
    assert [arm.name for arm in collect_arms(runs)[0]] == ["processes=1", "processes=2"]


def test_the_responses_of_a_step_are_those_of_all_processes(tmp_path):
    sizes = ("per_device_train_batch_size=4", "num_generations=4", "steps_per_generation=2")
    run = read_run(leave(tmp_path / "run", "coupled", 0, 40, *(f"grpo.{size}" for size in sizes)))
    run.result["processes"] = 8
    assert "A dot is one step (64 sampled responses" in _curves(run)


def test_arms_are_named_by_what_differs(tmp_path):
    runs = [
        leave(tmp_path / "a", "uniform", 0, 40),
        leave(tmp_path / "b", "coupled", 0, 40, "rhythm.gamma_amp=1.2"),
        leave(tmp_path / "c", "coupled", 1, 40, "rhythm.gamma_amp=1.2"),
        leave(tmp_path / "d", "coupled", 0, 40, "rhythm.gamma_amp=1.2", "eval.seed=5"),
        leave(tmp_path / "e", "uniform", 0, 41),
    ]
    arms, repeated = collect_arms([read_run(run) for run in runs])
    assert [arm.name for arm in arms] == [
        "uniform, gamma_amp=1.5, eval.seed=1234",
        "coupled, gamma_amp=1.2, eval.seed=1234",
        "coupled, gamma_amp=1.2, eval.seed=5",
    ]
    assert [list(arm.runs) for arm in arms] == [[0], [0, 1], [0]]
    assert [run.folder.name for run in repeated] == ["e"]
    alone = collect_arms([read_run(run) for run in runs[1:3]])[0]
    assert [arm.name for arm in alone] == ["coupled"]


def test_the_command_prints_arms_and_draws_every_seed(folders, tmp_path, capsys):
    again = leave(tmp_path / "again", "uniform", 2, 43, model=False)
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, folders), str(again), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(str(folders[0])) == 1
    assert re.search(
        r"coupled +0 1 2 3 +sampled +30\.0% +49\.5% \(7\.1\) +\+2\.0 \(2\.1; -7\.0 to \+11\.0\) +3", printed
    )
    assert "3 seeds are few" in printed
    assert f"Left out of the arms, which have these seeds already: {again}" in printed
    assert f"Measured, but ended before its model was saved: {again}" in printed
    text = page.read_text()
    assert "2 arms from 8 runs" in text
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S)]
    rings = [sum(e.get("class") == "seed" for e in svg.iter()) for svg in drawn]
    assert rings[:4] == [7, 7, 3, 3]  # accuracies of both arms, then the paired differences, sampled and greedy
    assert "+2.0 (2.1; -7.0 to +11.0)" in text
    assert "few" in text


def test_one_seed_an_arm_is_compared_run_by_run(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", str(folders[0]), str(folders[3]), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "against the first" in printed and "arm" not in printed.splitlines()[0].split()
    assert "few" not in printed
    assert "2 runs compared" in page.read_text()


def test_runs_that_were_evaluated_otherwise_are_named(folders, tmp_path, capsys):
    """A colder or shorter evaluation gives another accuracy, which no training did."""
    other = leave(tmp_path / "other", "coupled", 0, 60, "eval.temperature=0.6", "eval.batch_size=64")
    page = tmp_path / "page.html"
    assert main(["compare", str(folders[0]), str(other), "--output", str(page)]) == 0
    note = f"Evaluated otherwise than {folders[0]}: {other} (eval.temperature 0.6, not 1.0)."
    assert note in capsys.readouterr().out and note in page.read_text()
    assert main(["compare", str(folders[0]), str(folders[3]), "--output", str(page)]) == 0
    assert "otherwise" not in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["task.numbers=[3]", "task.level=paper"])
def test_runs_that_were_asked_other_questions_are_refused(folders, tmp_path, capsys, asked):
    """As many questions of the same split, and yet not the same ones: nothing can be paired."""
    other = leave(tmp_path / "other", "coupled", 0, 60, asked)
    assert main(["compare", str(folders[0]), str(other), "--output", str(tmp_path / "page.html")]) == 2
    assert f"evaluated on {asked.partition('=')[0]} " in capsys.readouterr().err


def test_the_page_goes_where_a_link_or_a_pipe_leads(folders, tmp_path, capsys):
    link, target = tmp_path / "link.html", tmp_path / "target.html"
    link.symlink_to(target)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    piped = []
    reader = threading.Thread(target=lambda: piped.append(pipe.read_text()), daemon=True)
    reader.start()
    for output in (link, pipe):
        assert main(["compare", *map(str, folders), "--output", str(output)]) == 0
    assert link.is_symlink() and "arms from" in target.read_text()
    assert pipe.is_fifo()
    reader.join(timeout=60)
    assert "arms from" in piped[0]


def test_arms_without_a_seed_in_common(folders, tmp_path, capsys):
    chosen = [folders[0], folders[1], folders[6]]
    assert main(["compare", *map(str, chosen), "--output", str(tmp_path / "page.html")]) == 0
    assert "no seed in common" in capsys.readouterr().out


def test_demo_seeds_trains_what_is_missing(tmp_path):
    """The Makefile's loop with a stand-in for Python that only notes its words; the base of the comparison is first."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n')
    python.chmod(0o755)
    for stamp in (".package", ".train"):
        (tmp_path / stamp).touch()
    project = tmp_path / "project"
    project.mkdir()
    (project / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("setup.py", "pyproject.toml"):
        (project / name).touch()
    for stamp in (".package", ".train"):
        (tmp_path / stamp).touch()
    finished, half = (project / "runs" / "seeds" / name for name in ("uniform-0", "coupled-0"))
    for run in (finished, half):
        run.mkdir(parents=True)
        (run / "result.json").touch()
    (finished / "model").mkdir()
    words = ["make", "-s", "demo-seeds", f"VENV={tmp_path}", "SEEDS=0 1", "MODES=uniform coupled", "ARGS=eval.size=8"]
    subprocess.run(words, cwd=project, check=True, capture_output=True)
    lines = (tmp_path / "words").read_text().splitlines()
    train = "-m training train training/recipes/countdown_tiny.yaml eval.size=8"
    runs = [("coupled", 0), ("uniform", 1), ("coupled", 1)]
    assert lines[:3] == [f"{train} rhythm.mode={m} grpo.seed={s} output.path=runs/seeds/{m}-{s}" for m, s in runs]
    assert lines[3].split()[-4:] == [f"runs/seeds/{m}-{s}" for m in ("uniform", "coupled") for s in (0, 1)]
    assert len(lines) == 4
