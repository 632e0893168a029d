"""Accuracy on held-out instances, with counts of what the responses hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .recipe import Eval
from .statistics import standard_error
from .task import CORRECTNESS, Figure, Instance, Task
from .task import texts as prompts


@dataclass
class Evaluation:
    """One response to each instance."""

    texts: list[str]
    tokens: list[list[int]]  # of each response, its end token included where it has one
    correct: list[bool]
    figures: dict[str, Figure] = field(default_factory=dict)  # of what the responses are made of, by the task
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Shares and means, ready for JSON; `right` is a 0 or 1 for each instance, for paired comparisons."""
        n, hits = len(self.correct), sum(self.correct)
        result: dict[str, Any] = {
            "instances": n,
            "accuracy": hits / n,
            "standard_error": standard_error(hits, n),
            "tokens": sum(map(len, self.tokens)) / n,
            "seconds": round(self.seconds, 2),
            "right": "".join("01"[c] for c in self.correct),
        }
        if self.figures:
            result["figures"] = {name: asdict(figure) for name, figure in self.figures.items()}
        return result


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[list[int]]:
    """One response to each prompt, as tokens up to and with the end token. A temperature of 0 is greedy.

    Prompts are batched by length. Sampling begins at `seed`, and the caller's random state stays as it was.
    """
    training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    responses: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
            inputs = inputs.to(model.device)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
            for i, tokens in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist()):
                stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
                responses[i] = tokens[: stop + 1]
            progress(len(chosen))
    model.train(training)
    return responses


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    instances: Sequence[Instance],
    settings: Eval,
    *,
    max_new_tokens: int,
    temperature: float,
    progress: Callable[[int], Any] = lambda done: None,
) -> Evaluation:
    """Answer every instance once and judge the answers."""
    started = time.perf_counter()
    tokens = generate(
        model,
        tokenizer,
        prompts(task, instances, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    totals: dict[str, int] = {}
    for text, instance in zip(texts, instances):
        for name, value in task.counts(text, instance).items():
            totals[name] = totals.get(name, 0) + value
    correct = [reward == 1.0 for reward in task.rewards[CORRECTNESS](texts, instances)]
    figures = task.figures(totals, len(texts), sum(correct))
    return Evaluation(texts, tokens, correct, figures, time.perf_counter() - started)
