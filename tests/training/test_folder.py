"""A run's folder at every moment that a run can be cut off: one run is read from it, or none."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training import evaluate_run as evaluating
from training import train as training
from training.__main__ import main
from training.compare import compare_runs
from training.evaluate import Evaluation
from training.evaluate_run import evaluate_run
from training.recipe import ROOT, RecipeError, load_recipe
from training.report import write_report

TINY = str(ROOT / "training" / "recipes" / "countdown_tiny.yaml")


class Crash(BaseException):
    """Stands for kill -9: from the first one on, nothing changes on the disk any more."""


class Disk:
    """Counts the changes to files under a folder and, from the n-th on, refuses them all.

    By an audit hook, which sees what Python itself opens, renames and removes: the test knows nothing of how the
    folder is written. Hooks cannot be taken away, so there is one, and it can be asleep.
    """

    def __init__(self):
        self.root, self.left = None, None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.root is None:
            return
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path = arguments[0] if arguments else None
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")
        if not changes or not isinstance(path, str | os.PathLike):
            return
        # rmtree removes by names relative to a descriptor: those count as well
        if os.path.isabs(path) and not Path(path).is_relative_to(self.root):
            return
        if self.left == 0:
            raise Crash
        self.left -= 1

    def run(self, root, changes, act):
        """Call `act` on a disk that stops after so many changes under `root`; returns how many were left over."""
        self.root, self.left = root, changes
        try:
            act()
        except Crash:
            pass
        finally:
            self.root = None
        return self.left


DISK = Disk()


def evaluation(right):
    return Evaluation(["x"] * 8, [[1, 2]] * 8, [i < right for i in range(8)], {}, 1.0)


def interrupt(*_):
    raise KeyboardInterrupt


class FakeModel:
    """Saves which run it is of, in two files."""

    def __init__(self, name):
        self.name = name

    def parameters(self):
        return []

    def save_pretrained(self, path):
        Path(path).mkdir(exist_ok=True)
        for i in range(2):
            (Path(path) / f"weights{i}.txt").write_text(self.name)


@pytest.fixture
def fast(monkeypatch):
    """`train.run` and `evaluate_run` with everything real but the model, TRL and the answers: milliseconds a run."""

    def build_trainer(recipe, config, model, tokenizer, task, rewards, recorder):
        def train():
            Path(config.output_dir).mkdir(exist_ok=True)  # as transformers does
            state = SimpleNamespace(global_step=0)
            for state.global_step in (1, 2):
                logs = {"loss": 0.0, "rewards/correctness/mean": recipe.grpo.seed / 8, "step_time": 1.0, "map_bytes": 1}
                logs |= {"row_tokens": 1, "completions/mean_length": 9.0, "entropy": 1.0}
                recorder.on_log(None, state, None, logs)
            checkpoint = Path(config.output_dir) / "checkpoint-2"
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / "state.json").write_text("{}")

        groups = SimpleNamespace(save=lambda path: Path(path).write_text("{}"))
        return SimpleNamespace(train=train, rhythm_groups=groups, state=SimpleNamespace(global_step=2))

    silent = SimpleNamespace(save_pretrained=lambda path: (Path(path) / "tokenizer.json").write_text("{}"))
    right = {"before": lambda recipe: 1, "after": lambda recipe: recipe.grpo.seed}

    def answers(model, tokenizer, task, instances, recipe, when):
        return {kind: evaluation(right[when](recipe)) for kind in ("sampled", "greedy")}

    loaded = []

    def load_saved(recipe, path):
        names = {p.read_text() for p in Path(path).glob("weights*")}
        loaded.append((recipe.grpo.seed, names))
        return FakeModel("?"), silent

    config = training.trainer_config(load_recipe(TINY))

    def trainer_config(recipe):
        config.output_dir = str(Path(recipe.output.path) / "checkpoints")
        return config

    monkeypatch.setattr(training, "trainer_config", trainer_config)
    fast_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    monkeypatch.setattr(yaml, "safe_load", lambda text: yaml.load(text, fast_loader))
    monkeypatch.setattr(training, "load", lambda recipe: (FakeModel(str(recipe.grpo.seed)), silent))
    monkeypatch.setattr(training, "check_model", lambda *_: None)
    monkeypatch.setattr(training, "build_trainer", build_trainer)
    monkeypatch.setattr(training, "evaluate_both", answers)
    monkeypatch.setattr(training, "examples", lambda *_: [])
    monkeypatch.setattr(evaluating, "load", load_saved)
    monkeypatch.setattr(evaluating, "check_model", lambda *_: None)
    monkeypatch.setattr(evaluating, "evaluate_both", lambda *_: {"sampled": evaluation(1), "greedy": evaluation(1)})
    return loaded


def start(folder, seed):
    """A run whose configuration, metrics, result, report and model all say its seed."""
    recipe = load_recipe(TINY, [f"output.path={folder}", f"grpo.seed={seed}", "eval.size=8"])
    training.run(recipe)


def status_of(words):
    try:
        return main(words)
    except KeyboardInterrupt:
        return pytest.fail("Ctrl-C came out as a traceback")


def begin(folder, seed):
    """A run that is interrupted before its first step."""
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(training, "evaluate_both", interrupt)
        start(folder, seed)


def read(folder, loaded, scratch):
    """The seed that each reader finds in a folder; asserts that it finds one run or says that there is none."""
    copy = scratch / "read"  # evaluate and report write
    shutil.rmtree(copy, ignore_errors=True)
    if not folder.exists():
        return {}
    shutil.copytree(folder, copy, symlinks=True)
    found = {}
    loaded.clear()
    for name, reader in (
        ("evaluate", lambda: evaluate_run(copy)),
        ("compare", lambda: compare_runs([copy], scratch / "page.html")),
        ("report", lambda: write_report(copy)),
    ):
        try:
            reader()
        except RecipeError as error:
            text = str(error)
            assert "no finished run" in text or "its model is not" in text
            continue
        seed = yaml.safe_load((copy / "config.yaml").read_text())["grpo"]["seed"]
        if name == "evaluate":
            assert loaded == [(seed, {str(seed)})]  # the whole model, of the run that the configuration is of
        result = json.loads((copy / "result.json").read_text())
        lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        assert result["seed"] == seed
        assert result["after"]["greedy"]["accuracy"] == seed / 8
        assert [line["accuracy"] for line in lines] == [seed / 8, seed / 8]
        found[name] = seed
    return found


def whole(folder, loaded, scratch):
    """The seed of the finished run in a folder; None where none is."""
    found = read(folder, loaded, scratch)
    return found["report"] if set(found) == {"evaluate", "compare", "report"} else None


def count_changes(folder, act):
    return 10**6 - DISK.run(folder, 10**6, act)


def test_a_run_cut_off_anywhere(fast, tmp_path, capsys):
    """A second run cut off at any change of a file: all readers find one run or none, and one is never lost."""
    first = tmp_path / "first"
    start(first, 1)
    assert whole(first, fast, tmp_path) == 1
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shutil.copytree(first, tmp_path / "all" / "run")
    changes = count_changes(tmp_path / "all", lambda: start(tmp_path / "all" / "run", 2))
    assert changes > 10
    assert whole(tmp_path / "all" / "run", fast, scratch) == 2
    seen = set()
    for n in range(changes + 1):
        run = tmp_path / str(n) / "run"
        shutil.copytree(first, run)
        DISK.run(run, n, lambda: start(run, 2))  # noqa: B023
        read(run, fast, scratch)
        here, before = whole(run, fast, scratch), whole(run / "previous", fast, scratch)
        moving = whole(run / "previous.partial", fast, scratch) or (run / "previous.partial").exists()
        seen.add((here, before))
        assert here or before or moving, n
        start(run, 3)  # a third run goes through, whatever it finds, and leaves itself alone
        assert whole(run, fast, scratch) == 3
        assert not any("previous" in p.name or "partial" in p.name for p in run.iterdir())
    assert seen >= {(1, None), (None, 1), (2, 1), (2, None)}
    capsys.readouterr()


def test_a_third_run_cut_off_keeps_the_finished_one(fast, tmp_path, capsys):
    """Two runs cut off in a row, anywhere: the finished one before them can still be read, here or in `previous`."""
    first, scratch = tmp_path / "first", tmp_path / "scratch"
    scratch.mkdir()
    start(first, 1)
    shutil.copytree(first, tmp_path / "all" / "run")
    changes = count_changes(tmp_path / "all", lambda: start(tmp_path / "all" / "run", 2))
    for n in range(1, changes + 1, 4):
        second = tmp_path / f"{n}" / "run"
        shutil.copytree(first, second)
        DISK.run(second, n, lambda: start(second, 2))  # noqa: B023
        for m in range(n % 7, 45, 7):
            run = tmp_path / f"{n}-{m}" / "run"
            shutil.copytree(second, run)
            DISK.run(run, m, lambda: start(run, 3))  # noqa: B023
            found = [whole(p, fast, scratch) for p in (run, run / "previous")]
            assert any(found) or (run / "previous.partial").exists(), (n, m)
            if not any(found):  # cut off while the names move: the next start completes that
                begin(run, 4)
                assert whole(run / "previous", fast, scratch) in (1, 2), (n, m)
            shutil.rmtree(run.parent)
    capsys.readouterr()


def test_a_second_run_is_kept_out(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start(run, 1)
    inner = training.evaluate_both

    def meanwhile(model, tokenizer, task, instances, recipe, when):
        if recipe.grpo.seed == 2 and when == "before":
            with pytest.raises(RecipeError, match="another run is writing there"):
                start(run, 3)
        return inner(model, tokenizer, task, instances, recipe, when)

    monkeypatch.setattr(training, "evaluate_both", meanwhile)
    start(run, 2)
    assert whole(run, fast, tmp_path) == 2
    start(run, 3)


def test_evaluate_does_not_write_into_another_run(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start(run, 1)
    inner = evaluating.evaluate_both

    def meanwhile(*arguments):
        start(run, 2)
        return inner(*arguments)

    monkeypatch.setattr(evaluating, "evaluate_both", meanwhile)
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


@pytest.mark.parametrize("moment", ["load", "build_trainer", "evaluate_both", "examples", "write_report"])
def test_ctrl_c_says_what_is_kept(fast, tmp_path, monkeypatch, capsys, moment):
    run = tmp_path / "run"
    start(run, 1)
    monkeypatch.setattr(training, moment, interrupt)
    capsys.readouterr()
    assert status_of(["train", TINY, f"output.path={run}", "grpo.seed=2", "eval.size=8"]) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("train:")]  # bars
    assert len(lines) == 1
    said = lines[0]
    assert said.startswith("interrupted; ")
    unchanged = moment in ("load", "build_trainer")
    assert ("nothing was changed" in said) == unchanged
    assert ("kept: nothing of this run" in said) == (moment == "evaluate_both")
    assert (f"the metrics of 2 steps in {run / 'metrics.jsonl'}, checkpoints in" in said) == (
        moment in ("examples", "write_report")
    )
    assert (f"mv {run / 'previous'} ELSEWHERE" in said) != unchanged
    assert whole(run, fast, tmp_path) == {"load": 1, "build_trainer": 1, "write_report": 2}.get(moment)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_ctrl_c_in_a_reader(fast, tmp_path, monkeypatch, capsys, command):
    run = tmp_path / "run"
    start(run, 1)
    monkeypatch.setattr(evaluating, "evaluate_both", interrupt)
    monkeypatch.setattr("training.compare._page", interrupt)
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
    with pytest.raises(RecipeError, match=r"no such answer; the finished run before is in .*previous"):
        start(run, 2)
    with pytest.raises(RecipeError, match=r"no finished run here.*; the finished run before is in .*previous"):
        evaluate_run(run)


def test_resuming_is_refused(tmp_path):
    for value in ("somewhere", ""):
        with pytest.raises(RecipeError, match=r"must not be set, got .*: runs cannot be resumed yet"):
            load_recipe(TINY, [f"grpo.resume_from_checkpoint={value}"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides that make the demo's recipe a matter of seconds, with an untrained model."""
    import torch

    from training.warmstart.model import build_model, build_tokenizer

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden=64, layers=4, heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return [
        f"model.path={path}",
        "task.train_size=16",
        "grpo.per_device_train_batch_size=8",
        "grpo.max_completion_length=8",
        "eval.size=4",
        "eval.split=validation",
    ]


def test_no_room_for_the_model(settings, tmp_path, capsys):
    """The real model on a disk that takes files of 150 kB at most: the result is kept, and readers say what is not."""
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        status = main(["train", TINY, *settings, "grpo.max_steps=1", f"output.path={run}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(errors) == 1
    assert f"the result in {run / 'result.json'}" in errors[0]
    assert errors[0].endswith("missing: the model")
    kept = {"config.yaml", "metrics.jsonl", "groups.json", "result.json", "report.html"}
    assert {p.name for p in run.iterdir()} == kept
    assert main(["evaluate", str(run)]) == 2
    assert "its model is not" in capsys.readouterr().err
    assert main(["compare", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert f"Measured, but ended before its model was saved: {run}." in capsys.readouterr().out


def test_ctrl_c_in_a_process(settings, tmp_path):
    """SIGINT in the middle of TRL's training: status 130, one line, no traceback."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "training", "train", TINY, *settings, "grpo.max_steps=5000", f"output.path={run}"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}

    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and so would its child

    with subprocess.Popen(command, cwd=ROOT, preexec_fn=listen, **pipes) as process:
        try:
            waited = time.monotonic() + 240
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text().count("\n"):
                assert process.poll() is None and time.monotonic() < waited
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("interrupted; kept until another run starts there: the metrics of ")
    assert last.endswith("missing: the result, the report, the model")
