"""Runs ended by Ctrl-C, a mistake or a full disk: they say what is kept, and change nothing before they begin."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from training import train as training
from training.__main__ import main
from training.evaluation import command as evaluating
from training.evaluation.command import evaluate_run
from training.folder import replacing
from training.recipe import RecipeError

from .fake_run import interrupt, start, whole
from .runs import TINY, interrupted, largest_file, save_model


def status_of(words):
    try:
        return main(words)
    except KeyboardInterrupt:
        return pytest.fail("Ctrl-C came out as a traceback")


@pytest.mark.parametrize("moment", ["load", "build_trainer", "evaluate_both", "examples", "write_report"])
def test_ctrl_c_says_what_is_kept(fast, tmp_path, monkeypatch, capsys, moment):
    run = tmp_path / "run"
    start(run, 1)
    monkeypatch.setattr(training, moment, interrupt)
    capsys.readouterr()
    words = [
        "train",
        TINY,
        f"output.path={run}",
        "grpo.seed=2",
        "eval.size=8",
        "grpo.max_steps=2",
        "task.train_size=8",
        "--overwrite",
    ]
    assert status_of(words) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("train:")]  # bars
    assert len(lines) == 1
    said = lines[0]
    assert said.startswith("interrupted; ")
    unchanged = moment in ("load", "build_trainer")
    assert ("nothing was changed" in said) == unchanged
    assert ("kept: nothing of this run" in said) == (moment == "evaluate_both")
    trained, finished = moment in ("examples", "write_report"), moment == "write_report"
    kept = (
        f"metrics of 2 steps in {run / 'metrics.jsonl'}, the checkpoint of step 2 in {run / 'checkpoints'}/checkpoint-2"
    )
    assert (kept in said) == trained
    assert (f"it goes on with: python -m training train --resume {run}; " in said) == (not unchanged and not finished)
    assert (f"mv {run / 'previous'} ELSEWHERE" in said) != unchanged
    assert whole(run, fast, tmp_path) == {"load": 1, "build_trainer": 1, "write_report": 2}.get(moment)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_ctrl_c_in_a_reader(fast, tmp_path, monkeypatch, capsys, command):
    run = tmp_path / "run"
    start(run, 1)
    monkeypatch.setattr(evaluating, "evaluate_both", interrupt)
    monkeypatch.setattr("training.pages.compare._page", interrupt)
    capsys.readouterr()
    assert status_of([command, str(run)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was changed\n"


def test_a_mistake_before_the_start_changes_nothing(fast, tmp_path, monkeypatch, capsys):
    """What the model or the trainer refuses leaves the run before where it was, and no folder where none was."""
    run = tmp_path / "run"
    start(run, 1)
    before = sorted(run.rglob("*"))

    def refuse(*_):
        raise RecipeError("no such loss")

    for moment in ("load", "check_model", "build_trainer"):
        with monkeypatch.context() as patch:
            patch.setattr(training, moment, refuse)
            for folder in (run, tmp_path / "new" / "run"):
                with pytest.raises(RecipeError, match=r"^no such loss$"):
                    start(folder, 2)
        assert sorted(run.rglob("*")) == before
        assert not (tmp_path / "new").exists()
    assert whole(run, fast, tmp_path) == 1


def test_a_mistake_after_the_start_names_the_run_before(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start(run, 1)

    def refuse(*_):
        raise RecipeError("no such answer")

    monkeypatch.setattr(training, "evaluate_both", refuse)
    with pytest.raises(
        RecipeError, match=r"no such answer; kept: nothing .*; the finished run before is in .*previous"
    ):
        start(run, 2)
    with pytest.raises(RecipeError, match=r"no finished run here.*; the finished run before is in .*previous"):
        evaluate_run(run)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides that make the demo's recipe a matter of seconds, with an untrained model."""
    return [
        f"model.path={save_model(tmp_path_factory.mktemp('model'), hidden=64, layers=4, heads=2)}",
        "task.train_size=16",
        "grpo.per_device_train_batch_size=8",
        "grpo.max_completion_length=8",
        "eval.size=4",
        "eval.split=validation",
    ]


def test_no_room_for_the_model(settings, tmp_path, capsys):
    """The real model on a disk that takes files of 150 kB at most: what is there is kept, and with room it goes on."""
    run = tmp_path / "run"
    with largest_file(150_000):
        status = main(["train", TINY, *settings, "grpo.max_steps=2", "output.checkpoint_steps=1", f"output.path={run}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(errors) == 1
    assert str(run / "checkpoints") in errors[0]
    kept = f"; kept: the metrics of 1 step in {run / 'metrics.jsonl'}; "
    assert errors[0].endswith(f"{kept}it goes on with: python -m training train --resume {run}")
    assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.jsonl", "before.json", "checkpoints"}
    assert not list((run / "checkpoints").iterdir())
    assert main(["evaluate", str(run)]) == 2
    assert "it was cut off or is still going" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0


def test_no_room_for_the_tokenizer(settings, tmp_path):
    """It is written by Rust, whose errors are of no kind: they name a file all the same."""
    tokenizer = AutoTokenizer.from_pretrained(settings[0].partition("=")[2])
    said = f"^{tmp_path}/model: .*os error"
    with largest_file(1000), pytest.raises(OSError, match=said), replacing(tmp_path / "model") as partial:
        tokenizer.save_pretrained(partial)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_process(settings, tmp_path):
    """SIGINT in the middle of TRL's training: status 130, one line, no traceback."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    words = ["train", TINY, *settings, "grpo.max_steps=5000", f"output.path={run}"]
    error = interrupted(words, lambda: metrics.exists() and metrics.read_text().count("\n"))
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("interrupted; kept: the metrics of ")
    assert last.endswith(f"; it goes on with: python -m training train --resume {run}")
