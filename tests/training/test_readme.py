"""training/README.md as it stands: how to bring a task, the sizes of its tables, and how several processes start."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import yaml

from training.__main__ import main
from training.recipe import ROOT, load_recipe

README = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
SMALL = [  # sizes, and a model that is there without a hub: nothing else differs from what is printed
    *("model.path=null", "grpo.max_steps=2", "grpo.per_device_train_batch_size=8", "eval.size=8"),
]


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


def test_the_launch_of_several_processes():
    """The command is one that accelerate and a run take; the files of the table are those that there are."""
    from accelerate.commands.launch import launch_command_parser

    text = section("On one GPU, one node, several nodes")
    (command,) = blocks(text, "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["accelerate", "launch"]
    given = launch_command_parser().parse_args(words[2:])
    assert (given.config_file, given.module, given.training_script) == ("training/launch/ddp.yaml", True, "training")
    assert given.training_script_args[:2] == ["train", "RECIPE.yaml"]
    load_recipe(ROOT / "training" / "recipes" / "countdown_tiny.yaml", given.training_script_args[2:])
    assert set(re.findall(r"`(\w+\.yaml)`", text)) == {p.name for p in (ROOT / "training" / "launch").glob("*.yaml")}


def test_lora_and_reports(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    text = section("LoRA, and reports elsewhere")
    (lora,) = re.findall(r"`(model\.lora=\{.*?\})`", text)
    words = [lora, "grpo.report_to=[wandb, tensorboard]", "grpo.run_name=first", "grpo.project=rhythm"]
    recipe = load_recipe(ROOT / "training" / "recipes" / "countdown_tiny.yaml", words)
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (16, 32.0)
