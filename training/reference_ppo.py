"""PPO with rhythm credit, to be read beside `reference_loop.py`, whose parts it is made of: one process, no trainer.

    python -m training.reference_ppo training/recipes/countdown_tiny.yaml grpo.max_steps=10

One step, where it differs from GRPO's. (The method is arXiv 2510.13554v2: its objective, eq. 12, takes advantages of
tokens wherever they come from, and it reports no run of PPO.)

1. Responses are sampled and judged as there. The groups of one prompt mean nothing here.
2. The measured forward gives log-probs and credit, and its last hidden states give a `Critic` the value of the state
   before each token: the reward that is still to come.
3. `gae` compares what came with what was expected, token by token; `whiten` scales that over the batch.
4. Then credit multiplies (eq. 13): last, because whitening after it would undo what gamma adds to the whole batch, and
   turn signs as the mean moves. The critic's returns are neither whitened nor shaped: they predict rewards.
5. The surrogate is the loop's (eq. 12), without a KL term. The critic then fits the returns of this batch.

The critic reads hidden states that are detached, so its errors, large at first, never reach the model: the gradients
are the surrogate's alone, whatever the value loss, and no attention that credit measures was bent to predict rewards.
`RhythmCredit` is told of the policy alone, and its forward is the one that would be made without a critic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rhythm_kernels import RhythmCredit

from .recipe import Recipe
from .reference_loop import Batch, improve, main, measure
from .reference_loop import train as train_loop


@dataclass(frozen=True)
class PPO:
    """What PPO has to be told beyond a recipe's section `grpo`.

    Attributes:
        discount: PPO's gamma, from one response token to the next; 1 for a reward that comes once, at the end.
        decay: GAE's lambda. 1 is the reward to go minus the value, unbiased; below, the critic is trusted with what is
            more than about 1 / (1 - decay) tokens away.
        value_learning_rate: of the critic's AdamW.
        value_epochs: optimizer steps of the critic on a batch. They are cheap: the hidden states are there already.
        value_clip: how far a value may move from what it was before the batch until its gradient stops; None: any way.
        iterations: optimizer steps of the policy on a batch. The clipping of eq. 12 acts from the second on.
    """

    discount: float = 1.0
    decay: float = 1.0
    value_learning_rate: float = 1e-3
    value_epochs: int = 4
    value_clip: float | None = None
    iterations: int = 1


class Critic(nn.Module):
    """The value of a state, a linear function of the model's last hidden state; 0 before it has learnt anything."""

    def __init__(self, model: Any, settings: PPO | None = None) -> None:
        super().__init__()
        self.settings = settings or PPO()
        weight = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=self.settings.value_learning_rate, weight_decay=0.0)

    def forward(self, states: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(...)` float32 values."""
        return self.head(states.float()).squeeze(-1)

    def fit(self, states: Tensor, returns: Tensor) -> float:
        """Move the values of `(N, D)` states towards `(N,)` returns; the mean squared error that they had before."""
        if not len(returns):
            return 0.0
        old, clip = self(states).detach(), self.settings.value_clip
        if not self.optimizer.state:  # the first batch: weights that have to make up for the mean predict little else
            nn.init.constant_(self.head.bias, float(returns.mean()))
        for _ in range(self.settings.value_epochs):
            self.optimizer.zero_grad()
            value_loss(self(states), returns, old, clip).backward()
            self.optimizer.step()
        return float(value_loss(old, returns, old))


def value_loss(values: Tensor, returns: Tensor, old: Tensor, clip: float | None = None) -> Tensor:
    """Mean squared error over `(N,)` tokens; with `clip` the larger of it and that of values held near the `old`."""
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.max(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return error.mean()


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What the output layer reads in the forwards inside this block, `(B, S, D)` each, detached.

    A hook, because a model that is asked for hidden states returns those of all layers.
    """
    kept: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    try:
        yield kept
    finally:
        hook.remove()


def states_before(hidden: Tensor, mask: Tensor) -> Tensor:
    """`(N, D)`, the state in which each of the N response tokens was chosen: the hidden state one place before it.

    Args:
        hidden: `(B, S, D)`.
        mask: `(B, S)` bool, False at the first place, before which there is no state.
    """
    return hidden[:, :-1][mask[:, 1:]]


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, decay: float = 1.0) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16) of the response tokens, in their order.

    With the next response token t', `A[t] = r[t] + discount V[t'] - V[t] + discount decay A[t']`; what follows the last
    token is 0, also where a response was cut off: it is judged as it stands, and nothing is paid later that a value
    could stand for. Tokens in a hole of the mask, which a tool wrote, are no actions: none is estimated, and none comes
    between t and t'.

    Args:
        rewards: `(B,)`, paid at the last response token.
        values: `(B, S)`, of the state before the token at each place; read at response tokens alone.
        mask: `(B, S)` bool, the response tokens.

    Returns:
        `(B, S)`, 0 outside of the responses. Added to the values it is the return that a critic should predict.
    """
    advantages = torch.zeros_like(values)
    paid, advantage, value = rewards, torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        surprise = paid + discount * value - values[:, t]
        advantage = torch.where(here, surprise + discount * decay * advantage, advantage)
        advantages[:, t] = torch.where(here, advantage, 0.0)
        value = torch.where(here, values[:, t], value)
        paid = torch.where(here, 0.0, paid)
    return advantages


def _differ(values: Tensor) -> bool:
    """Whether there is a variance: that of equal numbers is rounded, as their mean is, and so is seldom 0."""
    return bool((values - values[:1]).abs().max() > 1e-6 * values.abs().max()) if len(values) else False


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """`(B, S)` of mean 0 and variance 1 over all response tokens of the batch, 0 elsewhere and where all are equal."""
    of_tokens = advantages[mask]
    if not _differ(of_tokens):
        return torch.zeros_like(advantages)
    scaled = (of_tokens - of_tokens.mean()) / (of_tokens.std(correction=0) + 1e-8)
    return torch.zeros_like(advantages).masked_scatter(mask, scaled)


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rewards: Tensor,
    credit: RhythmCredit,
    critic: Critic,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """One batch: measure, estimate, whiten, shape, `iterations` steps of the policy, `value_epochs` of the critic.

    Args:
        rewards: `(B,)`, one a response.
        credit, generator: as for `reference_loop.learn`.

    Returns:
        `loss` of the policy's first step; `value_loss`, the critic's mean squared error before it saw the batch;
        `explained`, the share of the returns' variance that it foresaw, 0 of none; and the statistics of the credit.
    """
    mask, settings = batch.response_mask, critic.settings
    with last_hidden_states(model) as hidden:
        log_probs = measure(model, batch, credit, generator, temperature)
    states = states_before(hidden[0], mask)
    values = torch.zeros_like(log_probs.detach()).masked_scatter(mask, critic(states).detach())
    advantages = gae(rewards.to(values), values, mask, settings.discount, settings.decay)
    shaped = credit.shape(whiten(advantages, mask))
    options = {"iterations": settings.iterations, "max_grad_norm": max_grad_norm}
    loss = improve(model, optimizer, batch, log_probs, shaped, temperature, **options)

    returns = (advantages + values)[mask]
    value_error = critic.fit(states, returns)
    left = advantages[mask].var(correction=0) / returns.var(correction=0) if _differ(returns) else 1.0
    return {"loss": loss, "value_loss": value_error, "explained": 1 - float(left), **credit.statistics()}


def train(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[list[int], Callable[[str], float]]],
    recipe: Recipe,
    settings: PPO | None = None,
) -> Iterator[dict[str, float]]:
    """Train in place, yielding one report a step: the reference loop with `learn` for its algorithm."""
    return train_loop(model, tokenizer, questions, recipe, partial(learn, critic=Critic(model, settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], train))
