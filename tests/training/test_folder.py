"""A run's folder: what a run moves or removes there, what it leaves alone, and that it has it for itself."""

from __future__ import annotations

import shutil

import pytest

from training import open_run as files
from training import train as training
from training.__main__ import main
from training.evaluation import command as evaluating
from training.evaluation.command import evaluate_run
from training.recipe import RecipeError, load_recipe

from .fake_run import begin, start, whole
from .runs import FEW, TINY


def test_a_second_run_is_kept_out(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start(run, 1)
    inner = training.evaluate_both

    def meanwhile(model, tokenizer, task, instances, recipe, when):
        if recipe.grpo.seed == 2 and when == "before":
            with pytest.raises(RecipeError, match="another run or evaluation is writing there"):
                start(run, 3)
        return inner(model, tokenizer, task, instances, recipe, when)

    monkeypatch.setattr(training, "evaluate_both", meanwhile)
    start(run, 2)
    assert whole(run, fast, tmp_path) == 2
    start(run, 3)


def test_a_run_is_kept_out_while_its_folder_is_evaluated(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start(run, 1)
    inner = evaluating.evaluate_both

    def meanwhile(*arguments):
        for other in (lambda: start(run, 2), lambda: evaluate_run(run)):
            with pytest.raises(RecipeError, match="another run or evaluation is writing there"):
                other()
        return inner(*arguments)

    monkeypatch.setattr(evaluating, "evaluate_both", meanwhile)
    evaluate_run(run)
    assert whole(run, fast, tmp_path) == 1
    start(run, 2)  # with which the evaluation moves away
    assert not (run / "evaluation.json").exists() and not (run / "responses.jsonl").exists()


def test_evaluate_does_not_write_into_another_run(fast, tmp_path, monkeypatch, capsys):
    """On a system without locks."""
    run = tmp_path / "run"
    start(run, 1)
    inner = evaluating.evaluate_both

    def meanwhile(*arguments):
        start(run, 2)
        return inner(*arguments)

    monkeypatch.setattr(evaluating, "evaluate_both", meanwhile)
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.raises(RecipeError, match="took this one's place"):
        evaluate_run(run)
    assert not (run / "evaluation.json").exists()


def test_what_no_run_wrote_is_left_alone(fast, tmp_path, monkeypatch, capsys):
    """`output.path=.` in a folder of other things: they stay, and where a name is taken the run is refused."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    start(".", 1)
    start(".", 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "data").is_dir()
    for name, message in (("model", "model is there without"), ("config.yaml", "config.yaml is there without")):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).mkdir() if name == "model" else (other / name).write_text("debug: true\n")
        with pytest.raises(RecipeError, match=message):
            start(other, 1)
        assert [p.name for p in other.iterdir()] == [name]
    project = tmp_path / "project"  # whose own settings have the names of some of our groups
    (project / "model").mkdir(parents=True)
    (project / "config.yaml").write_text("model: {hidden: 12}\n")
    download = tmp_path / "download"
    download.mkdir()
    (download / "model.partial").write_text("half")
    for other in (project, download):
        before = sorted(other.rglob("*"))
        with pytest.raises(RecipeError, match=r"is there without the config\.yaml of a run"):
            start(other, 1)
        assert sorted(other.rglob("*")) == before
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"thesis\.txt is not what a run left"):
        start(".", 3)
    assert (tmp_path / "previous" / "thesis.txt").read_text() == "mine"


def test_a_start_says_what_becomes_of_what_was_there(fast, tmp_path, capsys):
    run = tmp_path / "run"
    start(run, 1)
    assert "previous" not in capsys.readouterr().out
    begin(run, 2)
    assert f"The run before is in {run / 'previous'} until this one has finished." in capsys.readouterr().out
    start(run, 3)
    said = capsys.readouterr().out
    assert f"until this one has finished; what a later run left unfinished in {run} is removed." in said


def test_groups_that_the_run_would_move_away_are_refused(fast, tmp_path, capsys):
    run = tmp_path / "run"
    start(run, 1)
    recipe = load_recipe(TINY, [f"output.path={run}", f"rhythm.groups={run / 'groups.json'}"])
    with pytest.raises(RecipeError, match=r"rhythm\.groups must be outside of output\.path, got"):
        training.run(recipe)
    assert whole(run, fast, tmp_path) == 1


def test_links_are_not_followed(fast, tmp_path, capsys):
    run, outside = tmp_path / "run", tmp_path / "outside"
    start(run, 1)
    shutil.move(run / "model", outside)
    (run / "model").symlink_to(outside)
    shutil.move(run / "checkpoints", tmp_path / "states")
    (run / "checkpoints").symlink_to(tmp_path / "states")
    start(run, 2)
    assert (outside / "weights0.txt").read_text() == "1"
    assert (tmp_path / "states" / "checkpoint-2" / "state.json").exists()
    assert not (run / "model").is_symlink()
    (run / "previous").symlink_to(outside)
    with pytest.raises(RecipeError, match="previous is not what a run left"):
        start(run, 3)


@pytest.mark.parametrize("name", [".", "..", "link", "project", "''", "dangling"])
def test_nothing_of_others_is_deleted(tmp_path, monkeypatch, capsys, name):
    """A run that gets as far as its first evaluation in folders that hold other things, reached in several ways."""
    project = tmp_path / "project"
    (project / "inside").mkdir(parents=True)
    for path in (tmp_path / "mine.txt", project / "model.py", project / "inside" / "config.json"):
        path.write_text("mine")
    (project / "results").mkdir()
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}

    def cut(*_):
        raise RecipeError("cut off")

    for what in ("load", "check_model", "build_trainer"):
        monkeypatch.setattr(training, what, lambda *_: (None, None))
    monkeypatch.setattr(training, "_headline", lambda *_: "")
    monkeypatch.setattr(training, "evaluate_both", cut)
    monkeypatch.chdir(project / "inside" if name == ".." else project if name in (".", "''") else tmp_path)
    for _ in range(2):
        assert main(["train", TINY, *FEW, f"output.path={name}"]) == 2
        assert ("cut off" in capsys.readouterr().err) == (name not in ("''", "dangling"))
        after = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
        assert before.items() <= after.items()
