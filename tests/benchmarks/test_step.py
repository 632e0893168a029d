"""The GRPO step's suites: what their gates let through, what is counted, and that the rivals do the same work."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import step, trainer
from benchmarks.contenders.step import StepGate, StepProblem, WithMaps
from benchmarks.contenders.trainer import Steps, TrainerGate, TrainerProblem
from benchmarks.runner import compete
from benchmarks.shapes import StepShape, TrainerShape, shapes
from benchmarks.suites import SUITES
from benchmarks.suites import step as counted
from benchmarks.targets import TARGETS
from benchmarks.timing import Budget
from rhythm_kernels import RhythmProbe

CPU = torch.device("cpu")
ONCE = Budget(0.0, 1, 1)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def tiny(**changes: object) -> StepShape:
    shape = shapes("grpo_step", "cpu", "tiny")[0]
    assert isinstance(shape, StepShape)
    return replace(shape, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problem() -> StepProblem:
    return StepProblem.draw(tiny(), CPU)


def test_gamma_of_the_probe_is_that_of_eager_maps_in_every_token(problem: StepProblem) -> None:
    ours, theirs = step.with_credit(problem)(), WithMaps(problem)()
    assert torch.equal(ours["gamma"], theirs["gamma"])
    assert torch.equal(ours["loss"], theirs["loss"])
    assert StepGate(problem).error(ours)[0] <= 1
    mask = problem.batch.response_mask
    assert 0.3 < float((ours["gamma"] != 1)[mask].float().mean()) < 0.8


def test_a_gamma_of_1_leaves_the_gradients_to_the_bit(problem: StepProblem) -> None:
    def gradients() -> list[Tensor]:
        found = [weight.grad for weight in problem.model.parameters()]
        problem.forget()
        return [x for x in found if x is not None]

    step._alone(problem)
    alone = gradients()
    step._credit(problem, step.OwnTime(CPU), amplitude=1.0)
    measured = gradients()
    assert len(alone) == len(list(problem.model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(alone, measured))
    step._credit(problem, step.OwnTime(CPU))
    assert step.largest_difference(alone, gradients()) > 0, "credit changes gradients"


def test_wrong_results_do_not_pass(problem: StepProblem) -> None:
    gate, right = StepGate(problem), step.with_credit(problem)()
    mask = problem.batch.response_mask
    gamma = right["gamma"]
    outside = gamma.clone()
    outside[~mask] = 1.5
    for name, wrong in {
        "a loss": {"loss": right["loss"] * 1.01, "gamma": gamma},
        "a loss that is no number": {"loss": right["loss"] * float("nan"), "gamma": gamma},
        "no loss": {"loss": right["loss"] * 0, "gamma": gamma},
        "credit outside": {"loss": right["loss"], "gamma": outside},
        "no credit": {"loss": right["loss"], "gamma": torch.ones_like(gamma)},
        "another gamma": {"loss": right["loss"], "gamma": torch.where(mask, gamma.flip(1), 1.0)},
    }.items():
        assert gate.error(wrong)[0] > 1, name
    assert gate.error({"loss": step.alone(problem)()["loss"]})[0] <= 1
    assert gate.error({"loss": right["loss"]})[0] > 1, "the loss with credit is not that without"


def test_the_gate_sees_another_measure(problem: StepProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.with_credit(problem)()
    fai = RhythmProbe.fai.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(RhythmProbe, "fai", property(lambda self: fai(self).roll(1, 1)))
    error, where = StepGate(problem).error(right)
    assert error > 1 and "gamma differs" in where


def test_the_gate_sees_other_gradients(problem: StepProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.with_credit(problem)()
    monkeypatch.setattr(StepProblem, "credit", lambda self, waad, fai, amplitude: 1.0 + 1e-6 * (waad > 5))
    monkeypatch.setattr(StepGate, "_gamma_differs", False)
    error, where = StepGate(problem).error(right)
    assert error > 1 and "gradients" in where


def test_layers_that_are_computed_again_are_not_measured_again() -> None:
    once, twice = (StepProblem.draw(tiny(checkpointing=c), CPU) for c in (False, True))
    count = 0

    def counting(*args: object) -> None:
        nonlocal count
        count += 1

    calls = {}
    for p in (once, twice):
        count = 0
        handle = p.model.model.layers[0].mlp.register_forward_pre_hook(counting)
        call = step.with_credit(p)
        got = call()
        handle.remove()
        calls[p.shape.checkpointing] = (count, call.own.count, got)  # type: ignore[attr-defined]
    assert calls[False][0] == 1 and calls[True][0] == 2
    layers = {layer for layer, _ in [*once.groups.local, *once.groups.global_]}
    assert calls[False][1] == calls[True][1] == len(layers) + 3  # the probe's start and end, and the credit
    assert torch.equal(calls[False][2]["gamma"], calls[True][2]["gamma"])


def test_the_second_model_follows_the_first(problem: StepProblem) -> None:
    p = StepProblem.draw(tiny(), CPU)
    theirs = WithMaps(p)
    before = theirs()["gamma"]
    with torch.no_grad():
        for weight in p.model.model.layers.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    after = theirs()["gamma"]
    assert not torch.equal(before, after)
    assert torch.equal(after, step.with_credit(p)()["gamma"])


def test_memory_counts_the_second_model_and_leaves_no_gradients(
    problem: StepProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.memory.peak", lambda call, device: (1000, "a stand-in"))
    entries, _ = compete("grpo_step", tiny(), CPU, ONCE)
    assert [entry.status for entry in entries] == ["ok"] * 4, [entry.reason for entry in entries]
    second = WithMaps(problem)
    decoder = sum(weight.nbytes for weight in problem.model.model.parameters())
    peaks = {entry.rival: (entry.peak_bytes, entry.peak_by) for entry in entries}
    assert peaks["step + credit"] == (1000, "a stand-in")
    assert peaks["step + eager maps"] == (1000 + decoder, "a stand-in and what is held between calls")
    for call in (step.alone(problem), step.with_credit(problem), second):
        call()
        assert all(weight.grad is None for weight in problem.model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_step_keeps_is_estimated_within_half(checkpointing: bool) -> None:
    shape = tiny(length=200, hidden=128, dim=32, intermediate=384, layers=6, checkpointing=checkpointing)
    p = StepProblem.draw(shape, CPU)
    weights = {weight.data_ptr() for weight in p.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = p.model.model(p.batch.input_ids, attention_mask=p.batch.attention_mask, use_cache=False)
    found = sum(sizes.values())
    assert hidden.last_hidden_state.requires_grad
    if checkpointing:  # one layer's part is kept only while it is computed again
        found += (counted.kept(tiny(**{**vars(shape), "checkpointing": False}))) // shape.layers
    assert 0.5 < counted.kept(shape) / found < 1.5


def test_counted_work() -> None:
    one, two = tiny(), tiny(checkpointing=True)
    assert SUITES["grpo_step"].work(two).flops * 3 == SUITES["grpo_step"].work(one).flops * 4
    matrices = StepProblem.draw(one, CPU).model.parameters()
    assert counted.weights(one) == sum(weight.numel() for weight in matrices if weight.dim() == 2)


def test_every_target_of_a_step_has_its_shape_and_rivals() -> None:
    from benchmarks.rivals import RIVALS

    found = [target for target in TARGETS if target.suite in ("grpo_step", "countdown_step")]
    assert {target.bound for target in found} == {1.02}
    for target in found:
        assert {target.rival, target.against} <= {rival.name for rival in RIVALS[target.suite]}
        assert target.length in {shape.length for shape in shapes(target.suite, target.device, "full")}


@pytest.fixture(scope="module")
def trainers() -> tuple[TrainerProblem, Steps, Steps]:
    p = TrainerProblem.draw(TrainerShape(batch=16, length=24, steps=2), CPU)
    return p, Steps(p, "uniform"), Steps(p, "coupled")


@needs_trl
def test_both_trainers_write_the_same_responses_call_after_call(
    trainers: tuple[TrainerProblem, Steps, Steps],
) -> None:
    p, plain, coupled = trainers
    weights = [x.clone() for x in coupled._trainer.model.parameters()]
    gate = TrainerGate(p)
    results = [call() for call in (plain, coupled, coupled, plain)]
    for got in results:
        assert gate.error(got)[0] == 0
        assert torch.equal(got["tokens"], results[0]["tokens"])
    assert "gamma" not in results[0] and bool((results[1]["gamma"] > 1).all())
    assert all(torch.equal(x, y) for x, y in zip(weights, coupled._trainer.model.parameters()))


@needs_trl
def test_a_trainers_own_seconds_are_those_of_one_step(trainers: tuple[TrainerProblem, Steps, Steps]) -> None:
    import time

    _, plain, _ = trainers
    started = time.perf_counter()
    plain()
    took = time.perf_counter() - started
    assert len(plain._times) == 2
    assert 0.1 * took / 2 < plain.own_seconds()[0] <= took / 2 * 1.5


def test_the_trainers_gate_refuses_what_is_no_step() -> None:
    p = TrainerProblem.draw(TrainerShape(batch=16, length=24, steps=2), CPU)
    gate = TrainerGate(p)
    right = {"loss": torch.zeros(2), "tokens": torch.tensor([20.0, 21.0])}
    assert gate.error(right)[0] == 0
    assert gate.error({**right, "loss": torch.tensor([0.0, float("nan")])})[0] > 1
    assert gate.error({**right, "loss": torch.zeros(1)})[0] > 1
    assert gate.error({**right, "tokens": torch.tensor([20.0, 24.0])})[0] > 1
    assert gate.error({**right, "gamma": torch.ones(2)})[0] > 1


def test_without_trl_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    entries, _ = compete("countdown_step", shapes("countdown_step", "cpu", "tiny")[0], CPU, ONCE)
    assert [(entry.status, entry.reason) for entry in entries] == [("unavailable", "trl is not installed")] * 2
