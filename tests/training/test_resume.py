"""Runs that go on: cut off anywhere they end as if they had not been, and no run is touched that was not meant."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from training import train as training
from training.__main__ import main
from training.recipe import load_recipe

from .runs import TINY, save_model

SHORT = [
    *("task.numbers=[3]", "task.train_size=8", "eval.size=4", "grpo.per_device_train_batch_size=8"),
    *("grpo.num_generations=4", "grpo.max_completion_length=12", "grpo.max_steps=7", "output.checkpoint_steps=2"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), hidden=32, layers=3, heads=2)


def carry_out(folder, model, *overrides):
    training.run(load_recipe(TINY, [*SHORT, f"model.path={model}", f"output.path={folder}", *overrides]))


def found(folder):
    """All that must not depend on where a run was cut off: metrics but for times, weights, and the result."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
    result = json.loads((folder / "result.json").read_text())
    for evaluation in (result["before"], result["after"]):
        for kind in evaluation.values():
            kind.pop("seconds")
    for name in ("name", "seconds", "cost", "resumed"):
        result.pop(name)
    weights = {name: x.tolist() for name, x in load_file(folder / "model" / "model.safetensors").items()}
    return metrics, result, weights


class Cut(Exception):
    """Stands for the death of a run."""


def cut_off(folder, model, *overrides, at):
    """A run that dies when it has written the checkpoint of step `at`, or later while it writes the next."""

    def dies(self, args, state, control, **_):
        if state.global_step == at:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(training.Recorder, "on_step_begin", dies, raising=False)
        carry_out(folder, model, *overrides)


STALE = ("grpo.steps_per_generation=2", "grpo.num_iterations=2", "output.checkpoint_steps=3")


@pytest.mark.parametrize("mode", ["random", pytest.param("coupled", marks=pytest.mark.long)])
def test_a_resumed_run_is_the_same_run(model, tmp_path, capsys, mode):
    """Over several passes of the data set, from a checkpoint within a generation batch that is trained on four times."""
    given = (f"rhythm.mode={mode}", *STALE)
    carry_out(tmp_path / "whole", model, *given)
    cut_off(tmp_path / "cut", model, *given, at=5)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-3"]
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert "Goes on after step 3." in capsys.readouterr().out
    assert found(tmp_path / "cut") == found(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["resumed"] == [3]
