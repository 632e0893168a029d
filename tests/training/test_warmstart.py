"""The warm start runs end to end, weighs the right tokens, and the checkpoint that ships is what it says."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.evaluation.evaluate import evaluate
from training.evaluation.generate import Decoding, answer
from training.recipe import Eval
from training.tasks.countdown import Countdown
from training.tasks.countdown.instances import split
from training.warmstart import build_model, build_tokenizer
from training.warmstart.__main__ import ANSWER_WEIGHT, MAX_NEW_TOKENS, VERDICT_WEIGHT, encode, main

CHECKPOINT = Path(__file__).parents[2] / "training" / "checkpoints" / "countdown_tiny"


@pytest.fixture
def one_thread():
    """The command sets torch's thread count for its process; other tests want theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_steps_make_a_loadable_checkpoint_and_repeat_exactly(tmp_path: Path, one_thread: None) -> None:
    small = ["--steps", "2", "--hidden", "32", "--layers", "2", "--heads", "2", "--validation", "4"]
    main([str(tmp_path / "a"), *small])
    main([str(tmp_path / "b"), *small])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert first.config.model_type == "qwen3"
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert "--seed 0" in provenance["command"]
    assert str(tmp_path) not in json.dumps(provenance)


def test_loss_weights_fall_on_the_right_tokens() -> None:
    tokenizer = build_tokenizer()
    for ids, weights in encode(split("train", 40, (3, 4), level="tiny"), tokenizer, random.Random(0)):
        words = tokenizer.convert_ids_to_tokens(ids)
        colon, answer = words.index(":"), words.index("answer")
        for position, (word, weight) in enumerate(zip(words, weights, strict=True)):
            if position <= colon:
                assert weight == 0.0  # the prompt is not learnt
            elif position > answer:
                assert weight == ANSWER_WEIGHT  # the end token included
            else:
                assert weight == (VERDICT_WEIGHT if word in ("lo", "hi", "ok") else 1.0)
        assert words[-1] == tokenizer.eos_token


def test_generation_does_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden=32, layers=2, heads=2).eval()
    prompts = tokenizer(["nums 2 11 7 target 6 :", "use 2 , 11 , 7 , 9 to make 6 :"])["input_ids"]
    greedy = Decoding(8, temperature=0.0)
    together = answer(model, tokenizer, prompts, greedy)
    alone = [answer(model, tokenizer, [p], greedy)[0] for p in prompts]
    assert together == alone


def test_the_checkpoint_that_ships() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16e6
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.padding_side == "left"
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    provenance = json.loads((CHECKPOINT / "provenance.json").read_text())
    assert provenance["parameters"] == sum(p.numel() for p in model.parameters())
    task = Countdown(Countdown.Settings("countdown"))
    few, greedy = task.instances("validation", 32), {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0}
    summary = evaluate(model, tokenizer, task, few, Eval(), **greedy).summary()
    figures = {name: figure["value"] for name, figure in summary["figures"].items()}
    assert figures["answered"] >= 0.85
    assert figures["arithmetic"] >= 0.95
    assert figures["verdicts"] >= 0.95
    assert summary["accuracy"] >= 0.2  # far below the published figure: 32 instances are few
