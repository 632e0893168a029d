"""Tasks through the command line: two steps of training and an evaluation, on a small random model that reads bytes."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.__main__ import main
from training.stand_in import byte_tokenizer
from training.tasks import multiple_choice
from training.tasks.reasoning_gym import questions

from .runs import TINY

FIXTURE = multiple_choice._FIXTURE
SHORT = [
    *("grpo.max_steps=2", "grpo.per_device_train_batch_size=4", "grpo.num_generations=2", "rhythm.horizon=[1,8]"),
    *("grpo.max_completion_length=16", "eval.size=4", "eval.batch_size=4", "rhythm.window=4"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A Llama of four layers, a token a byte."""
    path = tmp_path_factory.mktemp("model")
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(alphabet), pad_token_id=256, eos_token_id=257, bos_token_id=None, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    questions.end_processes()


def recipe(path, model: str, task: str, rewards: str = "[correctness]") -> list[str]:
    """A recipe file for a task, from the demo's."""
    text = Path(TINY).read_text(encoding="utf-8")
    text = re.sub(r"(?ms)^task:.*?(?=^\w)", f"task: {task}\n", text)
    (path / "recipe.yaml").write_text(text, encoding="utf-8")
    return [
        str(path / "recipe.yaml"),
        f"model.path={model}",
        f"output.path={path / 'run'}",
        f"grpo.rewards={rewards}",
        *SHORT,
    ]


def results(path) -> tuple[dict, list[dict]]:
    lines = (path / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads((path / "run" / "result.json").read_text()), [json.loads(line) for line in lines]


def test_multiple_choice_is_trained_and_evaluated(model: str, tmp_path, capsys) -> None:
    files = {split: str(FIXTURE / f"{split}.jsonl") for split in ("train", "validation", "test")}
    task = json.dumps({"name": "multiple_choice", "prompt": "chat", "train_size": 8, "question": "question", **files})
    assert main(["train", *recipe(tmp_path, model, task, "[crossthink,correctness]")]) == 0, capsys.readouterr().err
    result, lines = results(tmp_path)
    assert len(lines) == 2
    assert result["before"]["sampled"]["instances"] == 4
    assert {"boxed", "answered", "answered_right"} <= result["after"]["sampled"]["figures"].keys()
    assert "responses with a boxed answer" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "eval.split=validation"]) == 0
    assert "validation" in capsys.readouterr().out


def test_reasoning_gym_is_trained_and_evaluated(model: str, tmp_path, capsys) -> None:
    pytest.importorskip("reasoning_gym")
    task = json.dumps({"name": "reasoning_gym", "dataset": "lcm", "train_size": 8})
    assert main(["train", *recipe(tmp_path, model, task, "[score,format]")]) == 0, capsys.readouterr().err
    result, lines = results(tmp_path)
    assert len(lines) == 2
    assert {"answered", "right_of_answered"} <= result["after"]["sampled"]["figures"].keys()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "eval.split=validation"]) == 0
    assert "validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{name: reasoning_gym, dataset: propositional_logic, train_size: 8}", "error: task.dataset must be a set"),
        ("{name: reasoning_gym, dataset: lcms, train_size: 8}", "error: task.dataset must be a set of reasoning_gym"),
        ("{name: reasoning_gym, dataset: lcm, options: {a: 1}, train_size: 8}", "error: task.options must hold only"),
        ("{name: reasoning_gym, dataset: lcm}", "train_size must be a number, got None"),
        ("{name: reasoning_gym, train_size: 8}", "error: task.dataset must be the name of a set"),
        ("{name: multiple_choice, train: nowhere.jsonl, test: nowhere.jsonl}", "nowhere.jsonl: there is no such file"),
        ("{name: multiple_choice, prompt: hello}", "error: task.prompt must be one of base, chat, rows"),
        ("{name: multiple_choice, right_boxed: yes}", "error: task.right_boxed must be a number"),
        ("{name: multiple_choice, answers: letters}", "error: task.answers must be one of any, letter, index, text"),
    ],
)
def test_mistakes_are_one_line(model: str, tmp_path, capsys, task: str, said: str) -> None:
    if "reasoning_gym" in task:
        pytest.importorskip("reasoning_gym")
    assert main(["train", *recipe(tmp_path, model, task)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_package_that_is_missing_is_one_line(model: str, tmp_path, capsys, monkeypatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "reasoning_gym" else there(name, *rest)
    )
    assert main(["train", *recipe(tmp_path, model, "{name: reasoning_gym, dataset: lcm, train_size: 8}")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: task.name must be a task whose package is installed, got 'reasoning_gym': pip install"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(("written", "begins"), [("{{ bos_token }}", 1), ("", 0)])
def test_a_chat_is_asked_in_evaluation_as_in_training(written, begins, tmp_path, monkeypatch) -> None:
    """Of a tokenizer that puts a token before each text, as many do: whether a chat has it, its template says alone."""
    path = tmp_path / "model"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = written + tokenizer.chat_template
    tokenizer.save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=256, eos_token_id=257, **shape)
    ).save_pretrained(path)
    asked: list[int] = []
    generate = LlamaForCausalLM.generate

    def listening(self, input_ids, *rest, **options):
        asked.extend((input_ids == bos).sum(dim=1).tolist())
        return generate(self, input_ids, *rest, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", listening)
    files = {split: str(FIXTURE / f"{split}.jsonl") for split in ("train", "validation", "test")}
    task = json.dumps({"name": "multiple_choice", "prompt": "chat", "train_size": 8, "question": "question", **files})
    assert main(["train", *recipe(tmp_path, str(path), task, "[correctness]")]) == 0
    assert asked and set(asked) == {begins}
