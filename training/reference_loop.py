"""GRPO with rhythm credit in one file, to be read from top to bottom: torch and transformers, one process, no trainer.

    python -m training.reference_loop training/recipes/countdown_tiny.yaml grpo.max_steps=10

One step of the method (arXiv 2510.13554v2; equation numbers are the paper's):

1. `sample` a group of responses to each prompt.
2. Judge them; `group_advantages` compares each reward with its group's (eq. 6).
3. Run the model once over prompts and responses, measured by a `RhythmCredit`. That forward gives the log-probs to
   learn from, and on its way WAAD and FAI of every response token (eqs. 9 and 10): no map, no second model, no extra
   forward.
4. `credit.gamma` turns the two into a factor per token (eqs. 14 to 19); it multiplies the advantages (eq. 13).
5. `surrogate` is the clipped objective over these token advantages (eq. 12). One optimizer step.

The TRL subclass in `rhythm_kernels/integrations/trl/` is tested against this loop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rhythm_kernels import RhythmCredit

from .divergence import check_finite, in_step
from .evaluation.generate import ends, padded
from .recipe import Recipe, RecipeError, load_recipe
from .task import Instance


@dataclass
class Batch:
    """Prompts and their responses side by side: prompts padded on the left, responses on the right.

    Attributes:
        input_ids: `(B, S)` int64.
        attention_mask: `(B, S)` int64, 1 where there is a token.
        response_mask: `(B, S)` bool, the tokens that the model wrote, its end token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], group: int, max_new_tokens: int, temperature: float
) -> Batch:
    """`group` responses to each prompt, given as tokens; those to one prompt next to each other."""
    inputs = padded(tokenizer, [prompt for prompt in prompts for _ in range(group)]).to(model.device)
    end = sorted(ends(model, tokenizer))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    model.eval()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, eos_token_id=end, **sampling)
    model.train()
    start = inputs["input_ids"].shape[1]
    response = output[:, start:]
    ends_here = torch.isin(response, torch.tensor(end, device=response.device))
    ended = ends_here.cumsum(dim=1)
    live = (ended == 0) | ((ended == 1) & ends_here)  # up to the first end token
    return Batch(
        input_ids=output,
        attention_mask=torch.cat([inputs["attention_mask"], live.long()], dim=1),
        response_mask=torch.cat([torch.zeros_like(inputs["input_ids"], dtype=torch.bool), live], dim=1),
    )


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Eq. 6: `(B,)` rewards, centred and scaled within each group of responses to one prompt; 0 where all are equal."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    # The mean of equal numbers is rounded: of sixteen times 0.7 it is not 0.7, and Adam magnifies small gradients.
    centred = centred.where(grouped.amin(dim=1, keepdim=True) < grouped.amax(dim=1, keepdim=True), 0.0)
    return (centred / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten()


def log_distributions(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """`(B, S - 1, V)` float32: log-probs of all tokens that could have come second, third and so on."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return (logits[:, :-1].float() / temperature).log_softmax(dim=-1)


def token_log_probs(log_probs: Tensor, batch: Batch) -> Tensor:
    """`(B, S)` float32: log-prob of each token given those before it; 0 at the first place."""
    of_tokens = log_probs.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return nn.functional.pad(of_tokens, (1, 0))


@torch.no_grad()
def token_entropies(log_probs: Tensor) -> Tensor:
    """`(B, S)` float32, in nats: how open the choice of each token was; 0 at the first place."""
    return nn.functional.pad(-(log_probs.exp() * log_probs).sum(dim=-1), (1, 0))


def surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Eq. 12 as a loss: the clipped objective, averaged over all response tokens of the batch.

    Args:
        log_probs, old_log_probs, advantages: `(B, S)`; old log-probs are those of the policy that sampled.
        mask: `(B, S)` bool.
        clip: how far the probability ratio may leave 1 before it stops to matter.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.min(ratio * advantages, clipped * advantages)
    return -(objective * mask).sum() / mask.sum().clamp(min=1)


def measure(
    model: nn.Module, batch: Batch, credit: RhythmCredit, generator: torch.Generator | None, temperature: float
) -> Tensor:
    """The first forward over a batch, measured: token log-probs to learn from, and the credit's gamma.

    The model must still be the one that sampled: this forward is the behaviour policy's.
    """
    with credit.measuring(batch.response_mask):
        distributions = log_distributions(model, batch, temperature)
    credit.gamma(token_entropies(distributions), generator)
    return token_log_probs(distributions, batch)


def improve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    log_probs: Tensor,
    shaped: Tensor,
    temperature: float,
    *,
    iterations: int = 1,
    max_grad_norm: float = 1.0,
) -> float:
    """Take `iterations` optimizer steps on shaped advantages; the first uses the forward that `measure` made.

    Args:
        max_grad_norm: 0 is no limit, as in TRL.

    Returns:
        The loss of the first step.
    """
    old_log_probs, losses = log_probs.detach(), []
    for iteration in range(iterations):
        if iteration > 0:
            log_probs = token_log_probs(log_distributions(model, batch, temperature), batch)
        loss = surrogate(log_probs, old_log_probs, shaped, batch.response_mask)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or inf)
        check_finite(loss=float(loss.detach()), gradient_norm=float(norm))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0]


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    advantages: Tensor,
    credit: RhythmCredit,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    **steps: Any,
) -> dict[str, float]:
    """One batch: measure in the first forward, shape the advantages, and take the optimizer's steps.

    Args:
        advantages: `(B,)`, one a response.
        credit: of this model, with head groups where its mode needs them.
        generator: draws the tokens of `mode="random"`.
        steps: `iterations` and `max_grad_norm` of `improve`.

    Returns:
        `loss` of the first step, and the statistics of the credit.

    Raises:
        DivergedError: for a loss or a gradient that is not finite, before the weights are touched.
    """
    log_probs = measure(model, batch, credit, generator, temperature)
    loss = improve(model, optimizer, batch, log_probs, credit.shape(advantages), temperature, **steps)
    return {"loss": loss, **credit.statistics()}


def train(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[list[int], Callable[[str], float]]],
    recipe: Recipe,
    learner: Callable[..., dict[str, float]] | None = None,
) -> Iterator[dict[str, float]]:
    """Train in place, yielding one report a step.

    Args:
        questions: prompts as tokens, each with the function that rewards a completion; drawn in random order. What
            such a function raises passes.
        recipe: of its section `grpo`, the settings named in this file are obeyed and no others.
        learner: another algorithm: called as `learn` is, but with the rewards `(B,)` in place of advantages.

    Raises:
        ValueError: for no questions, a reward that is no finite number, settings that do not fit.
        DivergedError: where the model's numbers are not finite any more. No step is taken with them.
    """
    grpo = recipe.grpo
    count = grpo.per_device_train_batch_size // grpo.num_generations
    if count < 1:
        raise RecipeError(
            f"grpo.per_device_train_batch_size must be at least grpo.num_generations, {grpo.num_generations}, got "
            f"{grpo.per_device_train_batch_size}"
        )
    if not questions:
        raise ValueError("questions must hold some, got none")
    torch.manual_seed(grpo.seed)
    order, draws = (torch.Generator().manual_seed(grpo.seed) for _ in range(2))
    try:
        credit = RhythmCredit(model, recipe.rhythm)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"rhythm: {error}") from error
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=grpo.learning_rate, betas=(0.9, grpo.adam_beta2), weight_decay=grpo.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, grpo.warmup_steps, grpo.max_steps))
    for step in range(grpo.max_steps):
        drawn = [questions[i] for i in torch.randperm(len(questions), generator=order)[:count].tolist()]
        with in_step(step + 1):
            batch = sample(
                model,
                tokenizer,
                [prompt for prompt, _ in drawn],
                grpo.num_generations,
                grpo.max_completion_length,
                grpo.temperature,
            )
        texts = [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(batch.input_ids, batch.response_mask)
        ]
        judges = [judge for _, judge in drawn for _ in range(grpo.num_generations)]
        rewards = torch.tensor([_reward(judge, text) for judge, text in zip(judges, texts)], device=model.device)
        if credit.calibration_due(step):  # which heads are local and which are global, from this batch (eq. 7)
            credit.calibrate([vars(batch)])
        with in_step(step + 1):
            report = (learner or learn)(
                model,
                optimizer,
                batch,
                rewards if learner else group_advantages(rewards, grpo.num_generations),
                credit,
                generator=draws,
                temperature=grpo.temperature,
                max_grad_norm=grpo.max_grad_norm,
            )
        schedule.step()
        tokens = float(batch.response_mask.sum() / len(texts))
        yield {"step": step + 1, "reward": float(rewards.mean()), "tokens": tokens, **report}


def _reward(judge: Callable[[str], float], text: str) -> float:
    """A reward as a number: a NaN among them would be the advantage of its whole group, and then every weight's."""
    given = judge(text)
    try:
        reward = float("nan" if isinstance(given, str) else given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: of a tensor of several numbers
        reward = float("nan")
    if not isfinite(reward):
        raise ValueError(f"questions must hold functions that give a finite number, got {given!r} for {text[:80]!r}")
    return reward


def _rate(step: int, warmup: float, total: int) -> float:
    """Share of the learning rate: a linear rise over so many steps (below 1: that share of all), then a fall to 0."""
    warmup = ceil(total * warmup) if warmup < 1 else int(warmup)
    if step < warmup:
        return step / warmup
    return (total - step) / max(1, total - warmup)


def carry_out(recipe: Recipe, train: Callable[..., Iterator[dict[str, float]]], save: Path | None = None) -> None:
    """Train as a recipe says, and print a line a step."""
    from .models import load
    from .task import as_asked, check_rewards, instances_of, make

    if save:
        save.mkdir(parents=True, exist_ok=True)  # what cannot be written should not be trained
    with closing(make(recipe.task)) as task:
        check_rewards(task, recipe.grpo.rewards)
        model, tokenizer = load(recipe)
        judges = [task.rewards[name] for name in recipe.grpo.rewards]

        def judge(instance: Instance) -> Callable[[str], float]:
            return lambda text: sum(reward([text], [instance])[0] for reward in judges)

        instances = instances_of(task, "train", recipe.task.train_size)
        questions = [(as_asked(task.prompt(instance), tokenizer).tokens, judge(instance)) for instance in instances]
        for report in train(model, tokenizer, questions, recipe):
            print("  ".join(f"{name} {value:.4g}" for name, value in report.items()), flush=True)
        if save:
            model.save_pretrained(save)
            tokenizer.save_pretrained(save)


def main(arguments: Sequence[str], train: Callable[..., Iterator[dict[str, float]]] = train) -> int:
    """The command of this loop, or of another that has the same `train`.

    Returns:
        The exit status: 2 for a mistake, a task's error or a model that diverged, in a line; 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(description="Train as a recipe says, in one process, and print a line a step.")
    parser.add_argument("recipe", help="a YAML file, for example training/recipes/countdown_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where the trained model is written; else nowhere")
    asked = parser.parse_intermixed_args(arguments)
    try:
        carry_out(load_recipe(asked.recipe, asked.overrides), train, asked.save)
    except (RecipeError, OSError, UnicodeError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
