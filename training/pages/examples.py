"""A few held-out responses with WAAD, FAI and gamma of each token, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rhythm_kernels import HeadGroups, RhythmCredit, RhythmSettings

from ..evaluation.summary import Evaluation, Response
from ..task import Instance, Task, asked

SHOWN = 3  # responses
SHORTEST, LONGEST = 45, 160  # tokens: long enough for a horizon of 10 to say something, short enough to be read


def examples(
    model: Any,
    tokenizer: Any,
    task: Task,
    instances: Sequence[Instance],
    before: Evaluation,
    after: Evaluation,
    settings: RhythmSettings,
    groups: HeadGroups | None,
) -> list[dict[str, Any]]:
    """A few responses, first those that became right in training, measured by the trained model; ready for JSON."""
    first, last = before.first, after.first
    chosen = _choose(first, last)
    prompts = asked(task, [instances[i] for i in chosen], tokenizer)
    batches = [_inputs(prompt.tokens, last[i].tokens, model) for i, prompt in zip(chosen, prompts)]
    if not batches:
        return []
    # Baselines measure nothing while training: they are shown what coupled credit would have been.
    shown_as = settings if settings.reads_attention else replace(settings, mode="coupled")
    credit = RhythmCredit(model, replace(shown_as, groups=groups))
    if groups is None:
        credit.calibrate(batches)
    shown = []
    for i, prompt, batch in zip(chosen, prompts, batches):
        mask = batch.pop("response_mask")
        with torch.no_grad(), credit.measuring(mask):
            model(**batch, use_cache=False)
        measured = {"waad": credit.waad, "fai": credit.fai, "gamma": credit.gamma()}
        shown.append(
            {
                "label": task.label(instances[i]),
                "prompt": prompt.text,
                "before": first[i].text,
                "right_before": first[i].correct,
                "right": last[i].correct,
                "mode": credit.settings.mode,
                "tokens": [tokenizer.convert_ids_to_tokens(token) or f"<{token}>" for token in last[i].tokens],
                **{name: _rounded(x[mask]) for name, x in measured.items()},
            }
        )
    return shown


def _choose(before: Sequence[Response], after: Sequence[Response]) -> list[int]:
    """Indices of responses: of readable length first, and of those first what became right, then what stayed right."""

    def rank(i: int) -> tuple[bool, bool, bool, int]:
        readable = SHORTEST <= len(after[i].tokens) <= LONGEST
        return not readable, not after[i].correct, before[i].correct, i

    order = sorted((i for i in range(len(after)) if after[i].tokens), key=rank)
    return order[:SHOWN]


def _inputs(prompt: list[int], response: list[int], model: Any) -> dict[str, Tensor]:
    input_ids = torch.tensor([prompt + response], device=model.device)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    mask[:, len(prompt) :] = True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "response_mask": mask}


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 5) for x in values.tolist()]
