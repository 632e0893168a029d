"""Forward and backward of one GRPO step: alone, with credit, and with credit from a second model's maps, in two ways.

The step is that of `training.reference_loop`, without its optimizer, which is the same for all: the log-probs of the
responses, the clipped objective over token advantages, its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm_kernels import HeadGroups, RhythmProbe, RhythmSettings, rhythm_credit, shape_advantages
from training.reference_loop import Batch, group_advantages, log_distributions, surrogate, token_log_probs

from ..gate import Results
from ..shapes import StepShape
from . import eager_model
from .models import build, random_groups
from .own_time import PROBE, OwnTime, Told

Call = Callable[[], Results]
# What the gate runs in float32 on the device that is timed.
_CHECKED = StepShape(
    72, layers=3, hidden=64, heads=4, kv_heads=2, dim=16, intermediate=96, batch=3, prompt=12, lo=3, hi=20
)


@dataclass(frozen=True)
class StepProblem:
    """A causal language model in training, prompts and responses of different lengths, and an advantage for each."""

    shape: StepShape
    model: Any
    batch: Batch
    advantages: Tensor
    groups: HeadGroups

    @classmethod
    def draw(cls, shape: StepShape, device: torch.device, seed: int = 0) -> StepProblem:
        model = build(shape, "sdpa", device, head=True, seed=seed).train()
        if shape.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.batch, shape.length)
        ids = torch.randint(shape.vocabulary, size, generator=generator, device=device)
        # The first batch row is full; the last has half of a prompt and half of a response.
        share = torch.arange(shape.batch, device=device)[:, None] / (2 * max(shape.batch - 1, 1))
        position = torch.arange(shape.length, device=device)
        live = (position >= share * shape.prompt) & (
            position < shape.length - (share * (shape.length - shape.prompt)).floor()
        )
        group = max(shape.batch, 2)  # one response alone would have an advantage of 0: it is one of two
        rewards = torch.rand(group, generator=generator, device=device)
        advantages = group_advantages(rewards, group)[: shape.batch]
        batch = Batch(ids, live.long(), live & (position >= shape.prompt))
        return cls(shape, model, batch, advantages, random_groups(shape, seed))

    @property
    def device(self) -> torch.device:
        return self.batch.input_ids.device

    @property
    def horizon(self) -> tuple[int, int]:
        return self.shape.lo, self.shape.hi

    def credit(self, waad: Tensor, fai: Tensor, amplitude: float) -> Tensor:
        return rhythm_credit(waad, fai, self.batch.response_mask, "coupled", amplitude)

    def learn(self, log_probs: Tensor, shaped: Tensor) -> Tensor:
        """Gradients into the model's parameters; returns the loss. `log_probs`, `shaped`: `(B, T)`."""
        loss = surrogate(log_probs, log_probs.detach(), shaped, self.batch.response_mask)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        """Free the gradients: what a call leaves behind would be missing from the next one's peak."""
        self.model.zero_grad(set_to_none=True)


def _alone(p: StepProblem) -> Results:
    return {"loss": p.learn(token_log_probs(log_distributions(p.model, p.batch), p.batch), p.advantages[:, None])}


def _credit(p: StepProblem, own: OwnTime, amplitude: float = RhythmSettings.gamma_amp) -> Results:
    probe = RhythmProbe(p.model, p.groups, p.shape.window, p.horizon, p.batch.response_mask)
    with own.around(*PROBE), probe:
        log_probs = token_log_probs(log_distributions(p.model, p.batch), p.batch)
    with own.bracket():
        gamma = p.credit(probe.waad, probe.fai, amplitude)
        shaped = shape_advantages(p.advantages, gamma)
    return {"loss": p.learn(log_probs, shaped), "gamma": gamma}


def _maps(p: StepProblem, second: Any, read: Callable[..., Results]) -> Results:
    with torch.no_grad():  # the second model follows the one that learns
        for copied, weight in zip(second.parameters(), p.model.model.parameters()):
            copied.copy_(weight)
    batch = p.batch
    found = read(second, p.shape, p.groups, batch.input_ids, batch.attention_mask, batch.response_mask)
    gamma = p.credit(found["waad"], found["fai"], RhythmSettings.gamma_amp)
    log_probs = token_log_probs(log_distributions(p.model, batch), batch)
    return {"loss": p.learn(log_probs, shape_advantages(p.advantages, gamma)), "gamma": gamma}


def _without_gradients(p: StepProblem, run: Callable[[], Results]) -> Results:
    try:
        return run()
    finally:
        p.forget()


def alone(p: StepProblem) -> Call:
    return lambda: _without_gradients(p, lambda: _alone(p))


def with_credit(p: StepProblem) -> Call:
    """It tells what the probe, the credit and the shaping took."""
    return Told(p.device, lambda own: _without_gradients(p, lambda: _credit(p, own)))


class WithMaps:
    """The paper's way: a second model with eager attention is brought up to date and read, then the same credit.

    Args:
        layer_by_layer: a hook reduces each layer's maps and lets them go; otherwise the forward returns all of them.

    Attributes:
        resident_bytes: the second model's weights, which are held between calls: the entry's memory counts them.
    """

    def __init__(self, p: StepProblem, layer_by_layer: bool = True) -> None:
        self._problem = p
        self._read = eager_model.with_hooks if layer_by_layer else eager_model.with_maps
        self._second = build(p.shape, "eager", p.device)
        self.resident_bytes = sum(weight.nbytes for weight in self._second.parameters())

    def __call__(self) -> Results:
        return _without_gradients(self._problem, lambda: _maps(self._problem, self._second, self._read))


def with_all_maps(p: StepProblem) -> Call:
    return WithMaps(p, layer_by_layer=False)


class StepGate:
    """What a step must be: at the timed shape by what follows from gamma, and gamma itself on a small float32 problem.

    There gamma of the probe equals gamma of eager maps in every token, and with an amplitude of 1 the gradients are
    those of the step alone, bit for bit where that one repeats its own bits.
    """

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance (above 1: the gate is red), and where it was found."""
        p, mask = self.problem, self.problem.batch.response_mask
        gamma = got.get("gamma", torch.ones_like(mask, dtype=torch.float32))
        if "gamma" in got:
            boosted = (gamma != 1) & mask
            share = float(boosted.sum() / mask.sum())
            right = bool((gamma[~mask] == 1).all()) and bool(((gamma >= 1) & (gamma <= 1.75)).all())
            if gamma.shape != mask.shape or not right or not 0.2 <= share <= 0.8:
                return float("inf"), "gamma is no coupled credit"
            if self._gamma_differs:
                return float("inf"), "gamma differs between the probe and eager maps on a small problem"
            if self._gradients_differ:
                return float("inf"), "gradients differ with a gamma of 1 on a small problem"
        # On the policy the ratios are 1, so the loss is that of the advantages alone.
        token = shape_advantages(p.advantages, gamma) * mask
        error = (got["loss"] + token.sum() / mask.sum()).abs() / (1e-4 * token.abs().sum() / mask.sum())
        return float(error.nan_to_num(nan=float("inf"))), "loss"

    @functools.cached_property
    def _small(self) -> StepProblem:
        return StepProblem.draw(_CHECKED, self.problem.device)

    @functools.cached_property
    def _gamma_differs(self) -> bool:
        p = self._small
        return not torch.equal(with_credit(p)()["gamma"], WithMaps(p)()["gamma"])

    @functools.cached_property
    def _gradients_differ(self) -> bool:
        p = self._small

        def gradients(run: Callable[[], Results]) -> list[Tensor]:
            run()
            found = [weight.grad for weight in p.model.parameters() if weight.grad is not None]
            p.forget()
            return found

        one, two = (gradients(lambda: _alone(p)) for _ in range(2))
        measured = gradients(lambda: _credit(p, OwnTime(p.device), amplitude=1.0))
        return bool(largest_difference(one, measured) > 10 * largest_difference(one, two))


def largest_difference(one: list[Tensor], two: list[Tensor]) -> float:
    """Of two lists of tensors; infinite where they are not alike."""
    if [x.shape for x in one] != [x.shape for x in two]:
        return float("inf")
    return max(float((x - y).abs().nan_to_num(nan=float("inf")).max()) for x, y in zip(one, two))
