"""`evaluate` as it is called: a run, a recipe, a model and a task; several samples, test sets, cuts, and mistakes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

from training.__main__ import main
from training.evaluation import evaluate as engine
from training.evaluation.evaluate import batches, evaluate, samples_of
from training.evaluation.generate import Decoding
from training.models import load
from training.recipe import ROOT, RecipeError, load_recipe
from training.task import make

from .runs import TINY, save_model

TASK = '''
from dataclasses import dataclass

from training.task import Task, TaskSettings, one_by_one

LOG = []


def right(response):
    return sum(map(ord, response)) % 3 > 0


class Words(Task):
    """About two responses of three are right, by the letters in them."""

    @dataclass
    class Settings(TaskSettings):
        sets: bool = True

    def instances(self, split, size):
        size = 9 if size is None else size
        if size > 9:
            raise ValueError(f"size must be at most 9, got {size}")
        names = ["hard", "easy", "easy"] if self.settings.sets else []
        return [{"n": n, **({"set": names[n % 3]} if names else {})} for n in range(size)]

    def prompt(self, instance):
        return f"make {instance['n']} from"

    @property
    def rewards(self):
        def correctness(responses, instances):
            LOG.append(len(responses))
            return [float(right(response)) for response in responses]

        return {"correctness": correctness, "length": one_by_one(lambda response, instance: len(response))}

    def counts(self, response, instance):
        return {"words": len(response.split())}

    def close(self):
        LOG.append("closed")
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), hidden=16, layers=2, heads=2)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The task, importable; its calls of the reward, and of `close`."""
    (tmp_path / "word_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    import word_tasks

    yield word_tasks.LOG
    sys.modules.pop("word_tasks")


def words(model, output, *more):
    named = ["--model", str(model), "--task", "word_tasks:Words", "--output", str(output)]
    return ["evaluate", *named, "eval.size=null", "eval.max_tokens=6", "eval.batch_size=4", *more]


def read(folder):
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    return json.loads((folder / "evaluation.json").read_text()), lines


def test_a_model_and_a_task_without_a_run(model, log, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(words(model, output, "eval.samples={hard: 4, easy: 2}")) == 0
    found, lines = read(output)
    assert sorted(path.name for path in output.iterdir()) == ["evaluation.json", "responses.jsonl"]
    assert (found["model"], found["task"], found["split"]) == (str(model), "word_tasks:Words", "test")
    asked = {"hard": [0, 3, 6], "easy": [1, 2, 4, 5, 7, 8]}
    sampled = [line for line in lines if line["kind"] == "sampled"]
    wanted = [(i, s) for name, of in asked.items() for i in of for s in range({"hard": 4, "easy": 2}[name])]
    assert sorted((line["instance"], line["sample"]) for line in sampled) == sorted(wanted)
    assert [(line["instance"], line["sample"]) for line in lines if line["kind"] == "greedy"] == [
        (i, 0) for i in range(9)
    ]
    for line in lines:
        assert line["instance"] in asked[line["set"]]
        assert line["prompt"] == f"make {line['instance']} from"
        assert line["correct"] == (sum(map(ord, line["response"])) % 3 > 0) == (line["rewards"]["correctness"] == 1.0)
        assert line["rewards"]["length"] == len(line["response"])
        assert 1 <= line["tokens"] <= 6
        assert line["finished"] or line["tokens"] == 6
    right = {
        i: [line["correct"] for line in sorted(sampled, key=lambda x: x["sample"]) if line["instance"] == i]
        for i in range(9)
    }
    assert found["sampled"]["right"] == " ".join("".join("01"[x] for x in right[i]) for i in range(9))
    means = {i: sum(r) / len(r) for i, r in right.items()}
    of_set = {name: sum(means[i] for i in of) / len(of) for name, of in asked.items()}
    assert found["sampled"]["accuracy"] == pytest.approx(sum(means.values()) / 9)
    assert {name: of["accuracy"] for name, of in found["sampled"]["sets"].items()} == pytest.approx(of_set)
    assert found["sampled"]["mean_of_sets"]["accuracy"] == pytest.approx(sum(of_set.values()) / 2)
    assert found["sampled"]["sets"]["hard"]["samples"] == 4
    assert list(found["sampled"]["sets"]["hard"]["pass"]) == ["1", "2", "4"]
    assert list(found["sampled"]["pass"]) == ["1", "2"]
    best = sum(any(right[i]) for i in asked["hard"]) / 3
    assert found["sampled"]["sets"]["hard"]["pass"]["4"]["value"] == pytest.approx(best)
    assert found["sampled"]["cut_off"] == sum(not line["finished"] for line in sampled) / len(sampled)
    assert found["sampled"]["tokens"] == sum(line["tokens"] for line in sampled) / len(sampled)
    assert found["identity"]["eval"]["samples"] == {"hard": 4, "easy": 2}
    assert set(found["identity"]["versions"]) >= {"torch", "transformers", "python"}
    # a judge is asked once a batch: 9 first answers, 15 further ones, 9 greedy ones, four at a time
    assert log == [4, 4, 1, 4, 4, 4, 3, 4, 4, 1, "closed"]
    assert 0 < found["sampled"]["accuracy"] < 1 and best > 0
    printed = capsys.readouterr().out
    assert f"{model} on word_tasks:Words, 9 test instances" in printed
    for text in ("hard", "easy", "mean of sets", "pass@2", "avg@4 of 3 instances; pass@4", "cut off"):
        assert text in printed


def test_the_first_of_several_is_the_only_one(model, log, tmp_path):
    """More samples change none of those that one sample gives, nor the greedy ones."""
    for samples in (1, 3):
        assert main(words(model, tmp_path / str(samples), f"eval.samples={samples}", "task.sets=false")) == 0
    one, lines = read(tmp_path / "1")
    three, more = read(tmp_path / "3")
    assert [line for line in more if line["sample"] == 0] == lines
    assert one["greedy"] == three["greedy"]
    assert one["sampled"]["right"] == "".join(word[0] for word in three["sampled"]["right"].split(" "))
    assert "sets" not in three["sampled"] and "set" not in lines[0]
    assert len({line["response"] for line in more if line["kind"] == "sampled"}) > 9  # they are not all alike


def test_a_finished_one_is_printed_again(model, log, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(words(model, output)) == 0
    first, before = capsys.readouterr().out, (output / "responses.jsonl").stat()
    log.clear()
    assert main(words(model, output)) == 0
    again = capsys.readouterr().out
    assert log == ["closed"]
    assert "(finished before):" in again
    assert again.splitlines()[2:] == first.splitlines()[2:]
    assert (output / "responses.jsonl").stat() == before
    assert main(words(model, output, "eval.seed=5")) == 2
    error = capsys.readouterr().err
    assert "evaluation.json is of another evaluation: eval.seed was 1234, is 5; --overwrite removes it" in error
    assert (output / "responses.jsonl").stat() == before
    assert main(words(model, output, "eval.seed=5", "--overwrite")) == 0
    assert read(output)[0]["identity"]["eval"]["seed"] == 5


def test_another_model_is_another_evaluation(model, log, tmp_path, capsys):
    """Also at the same path; and the same model at another path is the same."""
    place, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, place)
    assert main(words(place, output)) == 0
    shutil.move(place, tmp_path / "moved")
    assert main(words(tmp_path / "moved", output)) == 0
    assert "finished before" in capsys.readouterr().out
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "moved" / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[7] += 0.01
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    assert main(words(tmp_path / "moved", output)) == 2
    assert "is of another evaluation: model.weights was" in capsys.readouterr().err


class Killed(BaseException):
    """A process that ends here and now."""


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_cut_after_any_batch_changes_nothing(model, log, tmp_path, monkeypatch, at):
    """In the middle of the samples, between the kinds, in the middle of the greedy ones: the bytes are the same."""
    several = ["eval.samples={hard: 4}", "eval.temperature=0.7", "eval.top_p=0.9", "eval.top_k=20"]
    assert main(words(model, tmp_path / "whole", *several)) == 0
    calls = iter(range(1, 100))
    inner = engine.answer

    def cut(*arguments):
        if next(calls) > at:
            torch.manual_seed(3)  # what a new process has is not what the old one had
            raise Killed
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "answer", cut)
        with pytest.raises(Killed):
            main(words(model, tmp_path / "cut", *several))
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    assert main(words(model, tmp_path / "cut", *several)) == 0
    for name in ("responses.jsonl", "evaluation.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_says_what_is_kept(model, log, tmp_path, monkeypatch, capsys):
    inner, calls = engine.answer, iter(range(100))

    def interrupt(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "answer", interrupt)
        assert main(words(model, tmp_path / "out")) == 130
    error = capsys.readouterr().err
    kept = f"kept: 8 responses in {tmp_path / 'out' / 'responses.jsonl'}; the same command goes on from there"
    assert error.endswith(f"interrupted; {kept}\n")
    assert main(words(model, tmp_path / "out")) == 0
    assert "going on after the 8 responses that it holds" in capsys.readouterr().out


def kill(command, environment, output, lines):
    """Start the command and end it with SIGKILL once the file has so many lines; whether that was before its end."""
    path = output / "responses.jsonl"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "training", *command], cwd=ROOT, env=environment, **quiet) as process:
        try:
            until = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < until:
                if path.exists() and path.read_bytes().count(b"\n") >= lines:
                    break
                time.sleep(0.01)
        finally:
            process.kill()
    return process.returncode == -9


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.long)])
def test_kill_9(model, log, tmp_path, kills):
    """Processes that are killed at random moments, and one that is not: the files are those of one alone."""
    small = ["eval.batch_size=2", "eval.samples=20", "task.sets=false"]
    assert main(words(model, tmp_path / "whole", *small)) == 0
    output, chance = tmp_path / "cut", random.Random(kills)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    moments = sorted(chance.sample(range(1, 170), kills))
    killed = [kill(words(model, output, *small), environment, output, moment) for moment in moments]
    assert any(killed)
    assert main(words(model, output, *small)) == 0
    for name in ("responses.jsonl", "evaluation.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_recipe_without_a_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "some.yaml"
    recipe.write_text(f"task: {{name: countdown}}\nmodel: {{path: {model}}}\ngrpo: {{max_completion_length: 5}}\n")
    assert main(["evaluate", str(recipe), "eval.size=4", "eval.samples=2"]) == 0
    place = tmp_path / "runs" / "evaluate" / f"countdown-{model.name}"
    found, lines = read(place)
    assert found["identity"]["eval"]["max_tokens"] == 5 and max(line["tokens"] for line in lines) <= 5
    assert len(found["sampled"]["right"].split(" ")) == 4
    assert {"score", "correctness", "format", "answered"} == set(lines[0]["rewards"])
    assert str(place.relative_to(tmp_path) / "responses.jsonl") in capsys.readouterr().out


def test_a_recipe_without_a_model(tmp_path, monkeypatch, capsys):
    """Its small random model is evaluated, and named by its class."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "some.yaml"
    recipe.write_text("task: {name: countdown}\nmodel: {path: null, architecture: Qwen3ForCausalLM}\n")
    assert main(["evaluate", str(recipe), "eval.size=2", "eval.max_tokens=4"]) == 0
    found, _ = read(tmp_path / "runs" / "evaluate" / "countdown-Qwen3ForCausalLM")
    assert found["model"] == "Qwen3ForCausalLM"
    assert "Qwen3ForCausalLM on countdown" in capsys.readouterr().out
    assert main(["evaluate", str(recipe), "eval.size=2", "model.architecture=null"]) == 2
    assert "model.path must be a folder or a name on the hub, got None" in capsys.readouterr().err


def test_room_is_for_the_prompt_and_what_is_drawn(model, tmp_path, capsys):
    """The longest response of a training that there is not takes none."""
    small = shutil.copytree(model, tmp_path / "small")
    command = ["evaluate", "--model", str(small), "--task", "countdown", "eval.size=2", "eval.max_tokens=8"]
    for count, message in (
        (40, ""),
        (16, "eval.max_tokens must be at most "),
        (4, "task: no response fits: the model"),
    ):
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": count}
        (small / "config.json").write_text(json.dumps(config))
        assert main([*command, "--output", str(tmp_path / "out")]) == (2 if message else 0)
        assert message in capsys.readouterr().err


def test_a_task_on_files_is_evaluated_on_all_of_them(model, tmp_path, capsys):
    """Without a recipe, unless a size is given: 512 is no number of theirs."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"nums": [2, 3, 4 + n], "target": 9 + n}) + "\n" for n in range(7)))
    command = ["evaluate", "--model", str(model), "--task", "countdown", f"task.test={rows}", "eval.max_tokens=4"]
    assert main([*command, "--output", str(tmp_path / "all")]) == 0
    assert "7 test instances" in capsys.readouterr().out
    assert main([*command, "eval.size=3", "--output", str(tmp_path / "some")]) == 0
    assert "3 test instances" in capsys.readouterr().out
    assert main([*command, "eval.size=8", "--output", str(tmp_path / "more")]) == 2
    assert "test must have 8 puzzles of 3 or 4 numbers, got 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "evaluate must be given a run, a recipe, or --model PATH --task NAME"),
        (["eval.size=4"], "evaluate must be given a run, a recipe, or --model PATH --task NAME"),
        (["--model", "MODEL"], "--model and --task must be given together"),
        (["--task", "countdown"], "--model and --task must be given together"),
        (["--model", "MODEL", "--task", "chess"], "task.name must be one of"),
        (
            ["--model", "MODEL", "--task", "nowhere:Any"],
            "task.name: nowhere:Any cannot be imported: ModuleNotFoundError",
        ),
        (["--model", "/nowhere/at/all", "--task", "countdown", "eval.size=2"], "/nowhere/at/all cannot be loaded"),
        (["--model", "MODEL", "--task", "countdown", "eval.samples=0"], "eval.samples must be at least 1 and at most"),
        (["--model", "MODEL", "--task", "countdown", "eval.samples={a: 0}"], "eval.samples must be at least 1 and"),
        (["--model", "MODEL", "--task", "countdown", "eval.samples=x"], "eval.samples must be a whole number or a map"),
        (
            ["--model", "MODEL", "--task", "countdown", "eval.samples={a: 2}"],
            "eval.samples must be a number: the task has",
        ),
        (
            ["--model", "MODEL", "--task", "word_tasks:Words", "eval.size=3", "eval.samples={c: 2}"],
            "eval.samples must name test sets of the task (easy, hard), got 'c'",
        ),
        (["--model", "MODEL", "--task", "word_tasks:Words"], "task, eval: size must be at most 9, got 512"),
        (["--model", "MODEL", "--task", "countdown", "eval.top_p=0"], "eval.top_p must be above 0 and at most 1"),
        (["--model", "MODEL", "--task", "countdown", "eval.top_k=-1"], "eval.top_k must be at least 0"),
        (["--model", "MODEL", "--task", "countdown", "eval.max_tokens=0"], "eval.max_tokens must be at least 1"),
        (
            ["--model", "MODEL", "--task", "countdown", "eval.size=2", "eval.max_tokens=100000"],
            "eval.max_tokens must be at most",
        ),
        (["--model", "MODEL", "--task", "countdown", "grpo.seed=1"], "an override of evaluate must begin with eval.,"),
        (["--model", "MODEL", "--task", "countdown", "runs/demo"], "an override of evaluate must begin with eval.,"),
        (["/nowhere"], "/nowhere: no finished run here"),
        (["/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["FOLDER"], "no finished run here"),
    ],
)
def test_mistakes_end_in_one_line(model, log, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["evaluate", *({"MODEL": str(model), "FOLDER": str(tmp_path)}.get(word, word) for word in given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


def test_options_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "runs/demo", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "runs/demo", "--output", "x", "--nonsense"])


def test_batches():
    """Short prompts first; every first response before any further one."""
    prompts = ["ccc", "a", "bb", "a"]
    assert batches(prompts, [1, 1, 1, 1], 3) == [[(1, 0), (3, 0), (2, 0)], [(0, 0)]]
    assert batches(prompts, [2, 1, 3, 1], 2) == [
        *([(1, 0), (3, 0)], [(2, 0), (0, 0)]),
        *([(2, 1), (2, 2)], [(0, 1)]),
    ]


def test_samples_of():
    instances = [{"set": "a"}, {"set": "b"}, {}]
    assert samples_of(instances, 3) == [3, 3, 3]
    assert samples_of(instances, {"b": 16}) == [1, 16, 1]
    with pytest.raises(RecipeError, match=r"eval\.samples must name test sets of the task \(a, b\), got 'c'"):
        samples_of(instances, {"c": 16})


def test_decoding_says_everything(model):
    """What a model's generation_config.json says of sampling does not reach an evaluation."""
    recipe = load_recipe(TINY, [f"model.path={model}", "eval.size=6", "eval.seed=3"])
    found = []
    for changed in (False, True):
        loaded, tokenizer = load(recipe)
        if changed:
            loaded.generation_config.update(top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0)
        task = make(recipe.task)
        instances = task.instances("test", 6)
        for temperature in (1.0, 0.0):
            done = evaluate(loaded, tokenizer, task, instances, recipe.eval, max_new_tokens=8, temperature=temperature)
            found.append([response.tokens for response in done.responses])
    assert found[:2] == found[2:]
    assert Decoding(8, 0.7, 0.9, 20).options()["top_k"] == 20


def test_rewards_that_are_not_one_each_are_refused(model, log, tmp_path, monkeypatch, capsys):
    """They would fall to other responses."""
    import word_tasks

    monkeypatch.setattr(word_tasks.Words, "rewards", {"correctness": lambda responses, instances: [0.0] * 5})
    assert main(words(model, tmp_path / "out")) == 2
    assert "rewards['correctness'] must give 4 numbers, one a response, got [0.0, 0.0" in capsys.readouterr().err


def test_top_k_is_heeded(model):
    """Only the likeliest token is left: sampling is greedy."""
    recipe = load_recipe(TINY, [f"model.path={model}", "eval.size=6", "eval.top_k=1"])
    loaded, tokenizer = load(recipe)
    task = make(recipe.task)
    instances = task.instances("test", 6)
    one, two = (
        [
            r.tokens
            for r in evaluate(
                loaded, tokenizer, task, instances, recipe.eval, max_new_tokens=8, temperature=t
            ).responses
        ]
        for t in (1.0, 0.0)
    )
    assert one == two
