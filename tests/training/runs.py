"""What tests of training share: a small model, the overrides of a short run, a finished run's files, a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from training.recipe import ROOT, load_recipe
from training.warmstart import build_model, build_tokenizer

TINY = str(ROOT / "training" / "recipes" / "countdown_tiny.yaml")
FEW = [
    *("task.numbers=[3]", "task.train_size=8", "eval.size=4", "grpo.per_device_train_batch_size=4"),
    *("grpo.num_generations=2", "grpo.max_completion_length=8", "grpo.max_steps=1"),
]


def save_model(path: Path, hidden: int, layers: int, heads: int) -> Path:
    """An untrained model of the demo's kind and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden=hidden, layers=layers, heads=heads).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def leave(folder, mode, seed, right, *overrides, model=True):
    """The files of a finished run that answered `right` of 100 questions, sampled, and 10 more greedily."""
    folder.mkdir(parents=True)
    given = [f"rhythm.mode={mode}", f"grpo.seed={seed}", f"output.path={folder}", *overrides]
    (folder / "config.yaml").write_text(yaml.safe_dump(load_recipe(TINY, given).to_dict(), sort_keys=False))

    def figures(count):
        answers = "1" * count + "0" * (100 - count)
        return {
            "instances": 100,
            "accuracy": count / 100,
            "standard_error": 0.05,
            "tokens": 70.0 + seed,
            "right": answers,
        }

    result = {
        "mode": mode,
        "seed": seed,
        "split": "test",
        "before": {"sampled": figures(30), "greedy": figures(40)},
        "after": {"sampled": figures(right), "greedy": figures(right + 10)},
        "seconds": {"training": 60.0},
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"step": s, "accuracy": right / 100 + s / 1000, "response_tokens": 70.0, "entropy": 0.4} for s in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if model:
        (folder / "model").mkdir()
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full as soon as a file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def interrupted(words: Sequence[str], ready: Callable[[], object], **env: str) -> str:
    """What `python -m training WORDS` says where Ctrl-C comes as soon as `ready` is true; asserts status 130."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and so would its child

    with subprocess.Popen(
        [sys.executable, "-m", "training", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        preexec_fn=listen,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            waited = time.monotonic() + 240
            while not ready():
                assert process.poll() is None and time.monotonic() < waited
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    return error
