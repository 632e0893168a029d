"""Sampled and greedy evaluation of the tiny model, with what the responses are made of."""

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tasks.countdown import Instance, tiny_prompt
from ..tasks.countdown_trace import MAX_TOKENS, TraceReport, analyse

MAX_NEW_TOKENS = MAX_TOKENS + 12  # the longest trace of the warm start, and a margin


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[str]:
    """Completions as text, end token removed. Temperature 0 is greedy, else the whole distribution is
    sampled.

    Large batches are the point: the tiny model's step costs mostly overhead, so 256 rows cost little more
    than 32.
    """
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    texts = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        encoded = encoded.to(model.device)
        output = model.generate(**encoded, max_new_tokens=max_new_tokens, **sampling)
        texts += tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return texts


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instances: Sequence[Instance],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, float]:
    """Accuracy and what it is made of, over one response an instance.

    Returns:
        `accuracy`, `answered`, `gave_up` (shares of responses), `equations`, `attempts` and `tokens` (means a
        response), `arithmetic` and `verdicts` (shares of equations and of verdicts that are right).
    """
    prompts = [tiny_prompt(**instance) for instance in instances]
    texts = generate(model, tokenizer, prompts, temperature=temperature, max_new_tokens=max_new_tokens)
    reports = [analyse(text, **instance) for text, instance in zip(texts, instances, strict=True)]
    names = [field.name for field in fields(TraceReport)]
    total = dict(zip(names, map(sum, zip(*map(astuple, reports), strict=True)), strict=True))
    count = len(reports)
    return {
        "accuracy": total["correct"] / count,
        "answered": total["answered"] / count,
        "gave_up": total["gave_up"] / count,
        "equations": total["equations"] / count,
        "attempts": total["verdicts"] / count,
        "arithmetic": total["right_arithmetic"] / max(1, total["equations"]),
        "verdicts": total["right_verdicts"] / max(1, total["verdicts"]),
        "tokens": sum(len(text.split()) for text in texts) / count,
    }
