"""training/README.md as it stands: how to bring a task, and the script for several processes."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml

from training.__main__ import main
from training.recipe import ROOT

README = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
SMALL = [  # sizes, and a model that is there without a hub: nothing else differs from what is printed
    *("model.path=null", "grpo.max_steps=2", "grpo.per_device_train_batch_size=8", "eval.size=8"),
]
TWO = ["grpo.max_steps=2", "grpo.per_device_train_batch_size=8", "grpo.steps_per_generation=2", "task.train_size=64"]


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_how_to_bring_a_task(tmp_path, monkeypatch, capsys):
    text = section("Bring a task")
    assert len(text.splitlines()) + 1 < 40  # with its title
    (task,), (recipe,), (commands,) = (blocks(text, language) for language in ("python", "yaml", "bash"))
    (tmp_path / "my_tasks.py").write_text(task)
    (tmp_path / "reverse.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    for command in commands.strip().splitlines():
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "training"]
        small = SMALL if words[3] == "train" else ["eval.size=8"]
        assert main([*words[3:], *small]) == 0, capsys.readouterr().err
    run = tmp_path / yaml.safe_load(recipe)["output"]["path"]
    assert {"report.html", "model", "config.yaml", "result.json"} <= {path.name for path in run.iterdir()}
    found = sys.modules["my_tasks"].Reverse
    task = found(found.Settings("", letters="abcdef"))
    one = task.instances("test", 64)[7]
    assert task.correct(f" '{one['word'][::-1]}'\n", one) and not task.correct("no", one)
    splits = [{q["word"] for q in task.instances(split, None)} for split in ("train", "validation", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 6**4
    with pytest.raises(ValueError, match="test must have 5000 words, got 162"):
        task.instances("test", 5000)


def test_the_recipes_of_its_table_are_there():
    named = set(re.findall(r"`(\w[\w.]+_\w+)`", section("The recipes").split("\n\n")[0]))
    assert named == {path.stem for path in (ROOT / "training" / "recipes").glob("*.yaml")}


def test_the_sizes_of_its_table_are_the_papers():
    rows = re.findall(
        r"^\| (one GPU|one GPU, .*|\w+ nodes? of 8 GPUs) \| (\d+) \| (\d+) \| (\d+) \|$", README, re.MULTILINE
    )
    assert len(rows) == 4
    for where, a, b, c in rows:
        processes = {"one G": 1, "one n": 8, "two n": 16}[where[:5]]
        assert (int(a) * processes * int(b), int(a) * processes * int(c)) == (32, 512)


@pytest.fixture
def script(tmp_path):
    """The script, in a folder of its own, and the recipe of the demo with two short steps."""
    text = section("On one GPU, one node, several nodes")
    (content,) = blocks(text, "python")
    path = tmp_path / "several.py"
    path.write_text(content)
    words = [
        "training/recipes/countdown_tiny.yaml",
        *TWO,
        "grpo.max_completion_length=32",
        f"output.path={tmp_path}/run",
    ]
    return path, words


def test_the_script_for_several_processes_as_one(script, tmp_path, monkeypatch):
    path, words = script
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    trainer = runpy.run_path(str(path), run_name="__main__")["trainer"]
    assert (trainer.state.global_step, trainer.args.generation_batch_size) == (2, 16)
    assert trainer.rhythm_groups is not None
    after = ["model.path=" + str(tmp_path / "run" / "model"), "eval.size=8", "grpo.max_completion_length=32"]
    assert main(["evaluate", words[0], *after, "--output", str(tmp_path / "measured")]) == 0


@pytest.mark.long
def test_the_script_for_several_processes_as_two(script, tmp_path):
    """As `torchrun` starts it: both take part in a batch, and one model is written."""
    path, words = script
    with path.open("a") as file:
        file.write('    print("of", trainer.accelerator.num_processes, "batch", config.generation_batch_size)\n')
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 2 batch 32") == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
