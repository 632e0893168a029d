"""The command line end to end, on a few thousand parameters: train, evaluate, compare, and what they leave."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml

from rhythm_kernels import HeadGroups
from training.__main__ import main
from training.evaluation import evaluate, generate
from training.pages.report import write_report

from .runs import FEW, TINY, save_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides that make the demo's recipe a matter of seconds, with an untrained model."""
    return [
        f"model.path={save_model(tmp_path_factory.mktemp('model'), hidden=32, layers=3, heads=2)}",
        "task.train_size=32",
        "grpo.max_steps=2",
        "grpo.per_device_train_batch_size=16",
        "grpo.max_completion_length=24",
        "eval.size=12",
        "eval.split=validation",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, settings):
    """A run with credit and one without, from the same model."""
    folder = tmp_path_factory.mktemp("runs")
    for name, mode in (("coupled", "coupled"), ("plain", "uniform")):
        assert main(["train", TINY, *settings, f"rhythm.mode={mode}", f"output.path={folder / name}"]) == 0
    return folder


def test_train_leaves_what_it_says(runs):
    run = runs / "coupled"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["grpo"]["max_steps"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 <= line["gamma_mean"] < 1.5
        assert 0 < line["rhythm_seconds"] < line["step_seconds"]
        assert line["map_bytes"] == 16 * 3 * 2 * line["row_tokens"] ** 2 * 4
        assert {"reward", "accuracy", "response_tokens", "entropy", "loss"} <= set(line)
    result = json.loads((run / "result.json").read_text())
    assert result["seed"] == 0
    assert set(result["versions"]) >= {"torch", "transformers", "trl", "python", "rhythm-kernels"}
    for when in ("before", "after"):
        for kind in ("sampled", "greedy"):
            found = result[when][kind]
            assert found["instances"] == len(found["right"]) == 12
            assert found["accuracy"] == found["right"].count("1") / 12
            assert {"equations", "attempts", "arithmetic", "verdicts", "answered"} <= set(found["figures"])
    for example in result["examples"]:
        assert len(example["tokens"]) == len(example["waad"]) == len(example["fai"]) == len(example["gamma"])
    assert (run / "model" / "model.safetensors").exists()
    assert HeadGroups.load(run / "groups.json").local
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_plain_grpo_measures_nothing_in_training(runs):
    result = json.loads((runs / "plain" / "result.json").read_text())
    assert result["cost"]["measuring_seconds"] == 0
    assert not (runs / "plain" / "groups.json").exists()
    assert result["examples"][0]["mode"] == "coupled"


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page would fetch."""

    EMPTY = frozenset({"meta", "input", "br", "rect", "line", "circle", "polyline", "polygon"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read_page(path):
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


def test_report_is_self_contained(runs):
    text, page = read_page(runs / "coupled" / "report.html")
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "prefers-color-scheme:dark" in text
    assert page.headings == [
        "Before and after",
        "Learning",
        "What the gain is made of",
        "Inside a response",
        "What was measured, and what it cost",
        "Settings",
    ]
    assert "nan" not in re.sub(r"<style>.*</style>", "", text)


def test_metrics_that_are_not_finite(runs, tmp_path, capsys):
    """As those of a run that diverged: every reader leaves them out, and the run is still the one that it was."""
    run = shutil.copytree(runs / "coupled", tmp_path / "run")
    one, two = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    broken = one | {"entropy": float("nan"), "accuracy": float("inf")}, two | {"entropy": float("nan")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    write_report(run)
    assert main(["compare", str(run), str(runs / "plain"), "--output", str(tmp_path / "page.html")]) == 0
    for page in (run / "report.html", tmp_path / "page.html"):
        assert not re.search("nan|inf", re.sub(r"<style>.*</style>", "", page.read_text()).replace("information", ""))
    assert main(["evaluate", str(run), "eval.size=4"]) == 0


def test_training_repeats(runs, settings, tmp_path):
    assert main(["train", TINY, *settings, f"output.path={tmp_path / 'again'}"]) == 0
    again, first = (json.loads((p / "result.json").read_text()) for p in (tmp_path / "again", runs / "coupled"))
    for when in ("before", "after"):
        for kind in ("sampled", "greedy"):
            one, two = ({k: v for k, v in r[when][kind].items() if k != "seconds"} for r in (again, first))
            assert one == two
    weights = [p / "model" / "model.safetensors" for p in (tmp_path / "again", runs / "coupled")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_evaluate(runs, capsys):
    assert main(["evaluate", str(runs / "coupled"), "eval.size=12"]) == 0
    found = json.loads((runs / "coupled" / "evaluation.json").read_text())
    result = json.loads((runs / "coupled" / "result.json").read_text())
    assert found["split"] == "validation"
    assert found["greedy"]["right"] == result["after"]["greedy"]["right"]
    assert found["sampled"]["right"] == result["after"]["sampled"]["right"]
    assert "12 validation instances" in capsys.readouterr().out


def test_compare(runs, tmp_path, capsys):
    output = tmp_path / "pages" / "compare.html"
    assert main(["compare", str(runs / "plain"), str(runs / "coupled"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "uniform" in printed
    assert "coupled" in printed
    assert "Not started from" not in printed
    text, page = read_page(output)
    assert page.links == []
    assert "2 runs compared" in text


def test_compare_warns_of_different_starts(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs / "coupled", other)
    result = json.loads((other / "result.json").read_text())
    result["before"]["greedy"]["right"] = "1" * 12
    (other / "result.json").write_text(json.dumps(result))
    assert main(["compare", str(runs / "plain"), str(other), "--output", str(tmp_path / "compare.html")]) == 0
    assert f"Not started from the model that {runs / 'plain'} started from: {other}" in capsys.readouterr().out


def test_compare_refuses_different_questions(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs / "coupled", other)
    result = json.loads((other / "result.json").read_text())
    result["split"] = "test"
    (other / "result.json").write_text(json.dumps(result))
    assert main(["compare", str(runs / "plain"), str(other), "--output", str(tmp_path / "compare.html")]) == 2
    assert "evaluated on split test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nothing.yaml"], "nothing.yaml: No such file"),
        (["train", TINY, "grpo.max_step=1"], "did you mean max_steps"),
        (["train", TINY, "model.path=/nowhere/at/all"], "cannot be loaded"),
        (["evaluate", "/nowhere"], "/nowhere: no finished run"),
        (["compare", "/nowhere"], "/nowhere: no finished run"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    words = [*words, f"output.path={tmp_path}"] if words[0] == "train" else words
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_before_and_after_are_computed_alike(tmp_path, monkeypatch):
    """A trainer gives the model's forward bfloat16 when it begins, and leaves it so; evaluations have it too."""
    model, run, found = save_model(tmp_path / "start", 64, 4, 4), tmp_path / "run", []

    def answer(model, tokenizer, prompts, decoding):
        found.append(model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.float())
        return generate.answer(model, tokenizer, prompts, decoding)

    monkeypatch.setattr(evaluate, "answer", answer)
    words = [*FEW, "grpo.bf16=true", "grpo.learning_rate=0", f"model.path={model}", f"output.path={run}"]
    assert main(["train", TINY, *words]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert len(found) == 6 and all(torch.equal(found[0], logits) for logits in found)
    assert main(["evaluate", str(run), "grpo.bf16=false", f"--output={tmp_path / 'out'}"]) == 0
    assert not torch.equal(found[0], found[-1])
