"""Runs of milliseconds, in which all is real but the model, TRL and the answers; and what readers find of them."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training import train as training
from training.evaluation import command as evaluating
from training.evaluation.command import evaluate_run
from training.evaluation.summary import Evaluation, Response
from training.pages.compare import compare_runs
from training.pages.report import write_report
from training.recipe import RecipeError, load_recipe

from .runs import TINY


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


def evaluation(right):
    rewards = [{"correctness": float(i < right)} for i in range(8)]
    return Evaluation([Response(i, 0, "x", 2, True, rewards[i], [1, 2]) for i in range(8)])


def interrupt(*_):
    raise KeyboardInterrupt


def replace_slow_parts(monkeypatch):
    """Patch `train.run` and `evaluate_run`; returns what the latter loads: the seed and the names in the weights."""

    def build_trainer(recipe, config, model, tokenizer, task, recorder):
        def carry_on(run):
            state = SimpleNamespace(global_step=0)
            for state.global_step in range(run.start.step + 1, recipe.grpo.max_steps + 1):
                logs = {"loss": 0.0, "rewards/correctness/mean": recipe.grpo.seed / 8, "step_time": 1.0, "map_bytes": 1}
                logs |= {"row_tokens": 1, "completions/mean_length": 9.0, "entropy": 1.0}
                recorder.on_log(None, state, None, logs)
                with run.writing() as folder:
                    checkpoint = folder / f"checkpoint-{state.global_step}"
                    checkpoint.mkdir()
                    (checkpoint / "state.json").write_text("{}")

        groups = SimpleNamespace(save=lambda path: Path(path).write_text("{}"))
        return SimpleNamespace(carry_on=carry_on, rhythm_groups=groups, model=model)

    silent = SimpleNamespace(save_pretrained=lambda path: (Path(path) / "tokenizer.json").write_text("{}"))
    right = {"before": lambda recipe: 1, "after": lambda recipe: recipe.grpo.seed}

    def answers(model, tokenizer, task, instances, recipe, when):
        return {kind: evaluation(right[when](recipe)) for kind in ("sampled", "greedy")}

    loaded = []

    def load(recipe, path=None):
        return FakeModel((path / "weights0.txt").read_text() if path else str(recipe.grpo.seed)), silent

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
    monkeypatch.setattr(training, "load", load)
    monkeypatch.setattr(training, "HeadGroups", SimpleNamespace(load=lambda path: None))
    monkeypatch.setattr(training, "check_model", lambda *_: None)
    monkeypatch.setattr(training, "build_trainer", build_trainer)
    monkeypatch.setattr(training, "evaluate_both", answers)
    monkeypatch.setattr(training, "examples", lambda *_: [])
    monkeypatch.setattr(evaluating, "load", load_saved)
    monkeypatch.setattr(evaluating, "check_model", lambda *_, **__: None)
    monkeypatch.setattr(evaluating, "identity_of", lambda recipe, *_: {"seed": recipe.grpo.seed})
    monkeypatch.setattr(evaluating, "evaluate_both", lambda *_: {"sampled": evaluation(1), "greedy": evaluation(1)})
    return loaded


def start(folder, seed, *overrides, overwrite=True):
    """A run of two steps whose configuration, metrics, result, report and model all say its seed."""
    given = [f"output.path={folder}", f"grpo.seed={seed}", "eval.size=8", "grpo.max_steps=2", *overrides]
    training.run(load_recipe(TINY, given), overwrite=overwrite)


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
        assert [(line["step"], line["accuracy"]) for line in lines] == [(1, seed / 8), (2, seed / 8)]
        found[name] = seed
    return found


def whole(folder, loaded, scratch):
    """The seed of the finished run in a folder; None where none is."""
    found = read(folder, loaded, scratch)
    return found["report"] if set(found) == {"evaluate", "compare", "report"} else None
