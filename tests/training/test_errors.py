"""Errors that are not of a setting: broken files of a run, what cannot be read or written, faults of the program."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml

from training import train as training
from training.__main__ import main
from training.folder import replacing, saving

from .runs import FEW, TINY, largest_file, leave


def test_faults_of_the_program_show_where(tmp_path, monkeypatch):
    def wrong(*_):
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(training, "load", wrong)
    with pytest.raises(AttributeError, match="a fault of ours"):
        main(["train", TINY, *FEW, f"output.path={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'trl'"), UnicodeError("no such\nletter"), OSError(28, "No space left", "a/file")],
)
def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    for module, command in (
        ("train.load", "train"),
        ("evaluation.command.read_run", "evaluate"),
        ("pages.compare.read_run", "compare"),
    ):
        monkeypatch.setattr(f"training.{module}", fail)
        words = [TINY, *FEW, f"output.path={tmp_path / 'run'}"] if command == "train" else [str(tmp_path)]
        assert main([command, *words]) == 2
        assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_a_full_disk_names_the_file(tmp_path):
    """Python's own writes, which know of no name, and torch's and safetensors', which are no `OSError`."""
    from safetensors.torch import save_file

    for write in (
        lambda path: path.write_text("x" * 10_000),
        lambda path: torch.save(torch.zeros(10_000), path),
        lambda path: save_file({"x": torch.zeros(10_000)}, path),
    ):
        path = tmp_path / "file"
        with largest_file(4096), pytest.raises(OSError, match=re.escape(str(path))), replacing(path) as partial:
            write(partial)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="another"), saving(path):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"half": '),
        ("result.json", "{}"),
        ("result.json", "[]"),
        ("result.json", "\udcff"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"step": 1}\n{"st'),
        ("config.yaml", "a: ["),
        ("config.yaml", "{task: , model: , grpo: , rhythm: , eval: , output: }"),
        ("config.yaml", "\udcff"),
        ("config.yaml", "[" * 200),
        ("config.yaml", "task: &a {x: *a}"),
        ("config.yaml", ("grpo.seed", {})),
        ("config.yaml", ("grpo.seed", [1])),
        ("config.yaml", ("more", 3)),
        ("result.json", "[" * 200_000),
        ("metrics.jsonl", "[" * 200_000),
        ("metrics.jsonl", '{"step": "one"}'),
        ("metrics.jsonl", '{"step": 1, "accuracy": "half"}'),
        *(
            ("result.json", (name, value))
            for name in ("before", "after", "after.sampled", "before.greedy", "seconds", "after.greedy.right", "split")
            for value in (5, None, {}, [], "x")
            if (name, value) != ("split", "x")
        ),
        *(("result.json", ("mode", value)) for value in (5, None, {}, [])),
        ("result.json", ("after.sampled.accuracy", float("nan"))),
        ("result.json", ("after.sampled.instances", 3)),
        ("result.json", ("seconds.training", True)),
    ],
)
def test_runs_whose_files_are_broken(tmp_path, capsys, name, content):
    run = leave(tmp_path / "run", "coupled", 0, 50)
    page = ["--output", str(tmp_path / "page.html")]
    assert main(["compare", str(run), *page]) == 0
    if isinstance(content, tuple):  # one value of the whole, by its name
        whole = yaml.safe_load((run / name).read_text())
        *names, last = content[0].split(".")
        inner = whole
        for key in names:
            inner = inner[key]
        inner[last] = content[1]
        content = json.dumps(whole)
    (run / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    capsys.readouterr()
    for words in (["compare", str(run), *page], ["evaluate", str(run)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: {run}: no finished run \({re.escape(name)} .*\)\n", error)


def test_evaluate_names_the_file_whose_setting_is_wrong(tmp_path, capsys):
    run = leave(tmp_path / "run", "coupled", 0, 50)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("dtype: float32", "dtype: int4"))
    assert main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: model.dtype must be one of")


def test_evaluate_takes_what_it_heeds(tmp_path, capsys):
    run = leave(tmp_path / "run", "coupled", 0, 50)
    for override in ("grpo.max_steps=5", "rhythm.mode=uniform", "output.path=x", "model.path=y"):
        assert main(["evaluate", str(run), override]) == 2
        assert "an override of evaluate must begin with eval., task." in capsys.readouterr().err


def test_pages_that_cannot_be_written(tmp_path, capsys):
    run = leave(tmp_path / "run", "coupled", 0, 50)
    for output, file in ((tmp_path, tmp_path), (run / "result.json" / "page.html", run / "result.json")):
        assert main(["compare", str(run), "--output", str(output)]) == 2
        assert str(file) in capsys.readouterr().err
    with largest_file(4096):
        assert main(["compare", str(run), "--output", str(tmp_path / "page.html")]) == 2
    assert re.fullmatch(rf"error: \[Errno 27\] .*: '{tmp_path / 'page.html'}'\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_terminal_without_our_letters(tmp_path, monkeypatch):
    """The table holds ±, which ASCII has not: a question mark is printed, and the status is 0."""
    run, screen = leave(tmp_path / "run", "coupled", 0, 50), (tmp_path / "screen").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["compare", str(run), "--output", str(tmp_path / "page.html")]) == 0
    screen.close()
    assert "50.0% ? 5.0%" in (tmp_path / "screen").read_text()
