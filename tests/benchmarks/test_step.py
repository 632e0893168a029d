"""The GRPO step's suites: what their gates let through, what is counted, and that the rivals do the same work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import fits
from benchmarks.contenders import step, trainer
from benchmarks.contenders.step import StepGate, StepProblem, WithMaps
from benchmarks.contenders.trainer import Steps, TrainerGate, TrainerProblem
from benchmarks.entries import Entry
from benchmarks.runner import compete
from benchmarks.shapes import StepShape, TrainerShape, shapes
from benchmarks.suites import SUITES
from benchmarks.suites import step as counted
from benchmarks.targets import TARGETS
from benchmarks.timing import Budget
from rhythm_kernels import RhythmProbe

CPU = torch.device("cpu")
ONCE = Budget(0.0, 1, 1)
ONE_RESPONSE = next(shape for shape in shapes("grpo_step", "cpu", "full") if shape.batch == 1)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def tiny(**changes: object) -> StepShape:
    shape = shapes("grpo_step", "cpu", "tiny")[0]
    assert isinstance(shape, StepShape)
    return replace(shape, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problem() -> StepProblem:
    return StepProblem.draw(tiny(), CPU)


def test_gamma_of_the_probe_is_that_of_eager_maps_in_every_token(problem: StepProblem) -> None:
    ours = step.with_credit(problem)()
    for theirs in (WithMaps(problem)(), step.with_all_maps(problem)()):
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
    assert [entry.status for entry in entries] == ["ok"] * 5, [entry.reason for entry in entries]
    second = WithMaps(problem)
    decoder = sum(weight.nbytes for weight in problem.model.model.parameters())
    peaks = {entry.rival: (entry.peak_bytes, entry.peak_by) for entry in entries}
    assert peaks["step + credit"] == (1000, "a stand-in")
    for way in ("all maps", "by layer"):
        assert peaks[f"step + eager, {way}"] == (1000 + decoder, "a stand-in and what is held between calls")
    for call in (step.alone(problem), step.with_credit(problem), second):
        call()
        assert all(weight.grad is None for weight in problem.model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_step_keeps_is_counted_within_a_fifth(checkpointing: bool) -> None:
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
    assert 0.8 < counted.kept(shape) / found < 1.2


# In a process of its own, whose allocator keeps nothing from the start.
_PEAKS = """
import json, torch
from benchmarks import memory
from benchmarks.contenders import step
from benchmarks.shapes import StepShape
from benchmarks.suites import step as counted
memory.keep_nothing()
torch.set_num_threads(1)
shape = StepShape(1024, layers=4, hidden=192, heads=6, kv_heads=2, dim=64, intermediate=576, prompt=64)
p = step.StepProblem.draw(shape, torch.device("cpu"))
ways = {
    "alone": (step.alone(p), counted.memory),
    "credit": (step.with_credit(p), counted.memory),
    "all maps": (step.with_all_maps(p), counted.maps_memory),
    "by layer": (step.WithMaps(p), counted.layer_memory),
}
found = {}
for name, (call, count) in ways.items():
    call()
    peak = memory.peak(call, p.device)[0] + getattr(call, "resident_bytes", 0)
    found[name] = peak, count(shape, "cpu")
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_peaks_are_counted_within_a_fifth_and_credit_adds_less_than_a_hundredth() -> None:
    """So a rival that is not run for want of memory has none: its count is right at lengths at which it runs."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PEAKS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for name, (peak, wanted) in found.items():
        assert 0.8 < wanted / peak < 1.2, (name, found)
    assert abs(found["credit"][0] / found["alone"][0] - 1) < 0.01
    assert found["all maps"][0] > 1.2 * found["by layer"][0]


def test_beyond_a_length_a_rival_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "grpo_step", replace(SUITES["grpo_step"], once_from=tiny().length))
    calls: list[str] = []
    make = step.StepProblem.learn
    monkeypatch.setattr(StepProblem, "learn", lambda p, *given: (calls.append(p.shape.name), make(p, *given))[1])
    entries, _ = compete("grpo_step", tiny(), CPU, Budget(60.0, 3))
    assert calls.count(tiny().name) == 4, "the rivals with a call of their own; the gate's have another shape"
    for entry in entries:
        assert entry.status == "ok" and entry.samples == 1 and entry.median == entry.p20 == entry.p80, entry.rival
        assert entry.median and entry.cpu and (entry.peak_bytes or "own kernels" in entry.rival)
    own = next(entry for entry in entries if "own kernels" in entry.rival)
    assert own.median < next(entry for entry in entries if entry.rival == "step + credit").median
    assert not SUITES["grpo_step"].once(10**6, torch.device("cuda"))


def test_what_has_no_room_is_told_beside_what_was_counted() -> None:
    def entry(rival: str, length: int, peak: int | None, **fields: object) -> Entry:
        shape = replace(ONE_RESPONSE, length=length)
        return Entry(
            "grpo_step", rival, shape.name, shape.dtype, shape.as_dict(), peak_bytes=peak,
            environment={"device": "Some CPU", "device_type": "cpu"}, **fields,  # type: ignore[arg-type]
        )  # fmt: skip

    rival = "step + eager, all maps"
    right = counted.maps_memory(replace(ONE_RESPONSE, length=4096), "cpu")
    entries = [
        entry("step + credit", 4096, 2**30),
        entry(rival, 4096, round(right / 1.1)),
        entry("step + credit", 8192, 3 * 2**30),
        entry(rival, 8192, None, status="does not fit", reason="needs 27.1 GiB, 20.0 are free"),
    ]
    (line,) = fits.lines(entries)
    assert line == (
        "step + eager, all maps: no room from 8,192 tokens on (needs 27.1 GiB, 20.0 are free), where step + credit "
        "trains in 3.0 GiB; counted +10% to +10% of what was measured"
    )
    assert fits.lines(entries[:3]) == [] and fits.lines(entries[3:]) == [], "nothing refused; nothing to set beside it"


def test_counted_work() -> None:
    one, two = tiny(), tiny(checkpointing=True)
    assert SUITES["grpo_step"].work(two).flops * 3 == SUITES["grpo_step"].work(one).flops * 4
    matrices = StepProblem.draw(one, CPU).model.parameters()
    assert counted.weights(one) == sum(weight.numel() for weight in matrices if weight.dim() == 2)


def test_every_target_of_a_step_has_its_shape_and_rivals() -> None:
    from benchmarks.rivals import RIVALS

    found = [target for target in TARGETS if target.suite in ("grpo_step", "grpo_step_memory", "countdown_step")]
    assert {(target.device, target.memory, target.bound) for target in found} == {
        ("cuda", False, 1.02),
        ("cpu", False, 1.03),
        ("cpu", True, 1.01),
    }
    measured = {shape.length for shape in shapes("grpo_step", "cpu", "full") if shape.batch == 1}
    assert measured == {target.length for target in found if target.device == "cpu"}
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
