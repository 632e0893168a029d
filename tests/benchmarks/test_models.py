"""The model suites: what their gate lets through, how a model is made, and what "the probe's own kernels" counts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import eager_model, models
from benchmarks.contenders.models import ModelGate, ModelProblem
from benchmarks.contenders.own_time import OwnTime, Told
from benchmarks.entries import Entry
from benchmarks.gate import WHOLE
from benchmarks.rivals import RIVALS
from benchmarks.runner import Choice, compete
from benchmarks.shapes import ModelShape, shapes
from benchmarks.suites import SUITES
from benchmarks.targets import TARGETS, verdict
from benchmarks.timing import Budget, contest

CPU = torch.device("cpu")
SHAPE = ModelShape(
    WHOLE + 40, layers=4, hidden=64, heads=4, kv_heads=2, dim=32, intermediate=96, batch=2, dtype="bfloat16"
)


def shifted(x: Tensor) -> Tensor:
    """Each token's value at the token after it."""
    return torch.cat([x[:, :1], x[:, :-1]], dim=1)


WRONG = {"zeros": torch.zeros_like, "shifted by a token": shifted, "scaled by 1.2": lambda x: 1.2 * x}


@pytest.fixture(scope="module", params=[False, True], ids=["", "padded"])
def problem(request: pytest.FixtureRequest) -> ModelProblem:
    return ModelProblem.draw(replace(SHAPE, padded=request.param), CPU)


@pytest.mark.parametrize("name", ["waad", "fai"])
def test_in_bfloat16_right_measures_pass_and_wrong_ones_do_not(problem: ModelProblem, name: str) -> None:
    gate = ModelGate(problem)
    got = models.probe(problem)()
    assert gate.error({name: got[name]})[0] < 0.5
    for what, wrong in WRONG.items():
        live = torch.ones_like(got[name], dtype=torch.bool) if problem.live is None else problem.live
        error, where = gate.error({name: torch.where(live, wrong(got[name]), 0.0)})
        assert error > 1.5 and where == name, f"{what} passed"
    assert gate.error({name: got[name].masked_fill(got[name] == got[name].max(), float("nan"))})[0] > 1
    assert gate.error({name: got[name][:1]})[0] > 1


def test_padding_has_no_measures(problem: ModelProblem) -> None:
    got = models.probe(problem)()["waad"]
    if problem.live is not None:
        assert not bool(got[~problem.live].any())
        assert ModelGate(problem).error({"waad": torch.where(problem.live, got, 1.0)})[0] > 1


def test_hidden_states_are_held_to_the_bit(problem: ModelProblem) -> None:
    gate = ModelGate(problem)
    alone, measured = models.forward(problem)(), models.probe(problem)()
    assert gate.error(alone) == (0.0, "")
    assert gate.error(measured)[0] < 1
    other = measured["hidden"].clone()
    other[-1, -1, 0] *= 1.01
    assert gate.error({**measured, "hidden": other})[1] == "hidden states changed by the probe"
    other[-1, -1, 0] = float("nan")
    assert gate.error({"hidden": other})[0] > 1


def test_both_eager_ways_agree_with_the_probe_on_padded_rows_with_gradients() -> None:
    shape = replace(SHAPE, length=150, dtype="float32", padded=True, gradients=True)
    entries, _ = compete("probe", shape, CPU, Budget(0.0, 1, 1))
    assert [entry.status for entry in entries] == ["ok"] * len(entries), [entry.reason for entry in entries]
    assert {"eager with maps", "eager with hooks", "forward + probe"} <= {entry.rival for entry in entries}
    assert "padded gradients" in entries[0].shape


def test_a_training_forward_keeps_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for gradients in (False, True):
        p = ModelProblem.draw(replace(SHAPE, length=20, gradients=gradients), CPU)
        handle = p.model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.requires_grad))
        assert not p.run().requires_grad
        handle.remove()
    assert seen == [False, True]


def test_weights_are_filled_at_once_and_repeatably(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4B weights nothing but one `normal_` a matrix may touch memory."""
    calls = []
    normal = Tensor.normal_

    def counted(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.device.type != "meta":
            calls.append(tuple(self.shape))
        return normal(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "normal_", counted)
    one, two = (models.build(SHAPE, "sdpa", CPU) for _ in range(2))
    matrices = [x for x in one.parameters() if x.dim() == 2]
    assert len(calls) == 2 * len(matrices)
    for name, x in one.state_dict().items():
        assert torch.equal(x, two.state_dict()[name]) and x.dtype == torch.bfloat16
    assert bool(one.rotary_emb.inv_freq.isfinite().all()) and float(one.rotary_emb.inv_freq[0]) == 1.0


def test_a_4b_model_has_the_size_of_one() -> None:
    shape = next(s for s in shapes("probe", "cuda", "full") if isinstance(s, ModelShape) and s.hidden == 2560)
    started = time.perf_counter()
    model = models.skeleton(shape, "sdpa", head=False)
    assert time.perf_counter() - started < 20  # transformers' own initialisation takes minutes
    assert {x.device.type for x in model.parameters()} == {"meta"}
    assert 3.5e9 < sum(x.numel() for x in model.parameters()) < 3.7e9  # 4.0e9 with embeddings of 151,936 words


def test_attention_is_neither_flat_nor_one_hot() -> None:
    p = ModelProblem.draw(replace(SHAPE, dtype="float32"), CPU)
    with torch.no_grad():
        layers = p.eager(p.ids, use_cache=False, output_attentions=True).attentions
    for maps in layers:
        last = maps[:, :, -1]  # (B, H, T)
        assert 3 / last.shape[-1] < float(last.max(dim=-1).values.mean()) < 0.5


def test_brackets_count_once_and_only_inside() -> None:
    class Work:
        def outer(self) -> str:
            time.sleep(0.02)
            return self.inner()

        def inner(self) -> str:
            time.sleep(0.01)
            return "done"

    own, work, plain = OwnTime(CPU), Work(), Work.outer
    with own.around((Work, "outer"), (Work, "inner")):
        time.sleep(0.05)
        assert work.outer() == "done" and own.count == 1
        assert work.inner() == "done" and own.count == 2
        with pytest.raises(TypeError):
            work.inner(1)  # type: ignore[call-arg]
    assert Work.outer is plain
    work.outer()
    assert own.count == 3
    assert 0.04 <= own.seconds()[0] < 0.05 + 0.04


def test_on_cuda_the_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for events: the n-th that is recorded lies at 10 n milliseconds of the device."""
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.waited = False

        def record(self) -> None:
            recorded.append(self)
            self.at = 10.0 * len(recorded)

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = OwnTime(torch.device("cuda"))
    for _ in range(3):
        with own.bracket(), own.bracket():
            pass
    assert len(recorded) == 6
    assert own.seconds()[0] == pytest.approx(0.03)


def test_the_probes_own_time_is_that_of_its_measured_layers() -> None:
    p = ModelProblem.draw(replace(SHAPE, length=60), CPU)
    call = models.probe(p)
    assert isinstance(call, Told)
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    layers = {layer for layer, _ in [*p.groups.local, *p.groups.global_]}
    assert call.own.count == len(layers) + 3  # with the forward's start, its end, and the reading
    assert 0 < call.own_seconds()[0] < took


class Telling:
    def __init__(self, seconds: float) -> None:
        self.calls, self.told = 0, seconds

    def __call__(self) -> None:
        self.calls += 1

    def own_seconds(self) -> tuple[float, float]:
        return self.told + self.calls, 0.5


def test_samples_that_a_call_tells_of_itself() -> None:
    whole, alone = Telling(100.0), Telling(200.0)
    calls = {"whole": whole, "alone": alone, "other": lambda: None}
    samples = contest(calls, CPU, Budget(0.0, 3, 3), {"part": "whole", "alone": "alone"})
    assert samples["part"].wall == [100.0 + i for i in range(1, whole.calls + 1)]
    assert set(samples["part"].cpu) == {0.5}
    assert len(samples["whole"].wall) == whole.calls and max(samples["whole"].wall) < 1
    assert samples["alone"].wall == [200.0 + i for i in range(1, alone.calls + 1)]
    assert len(samples["other"].wall) >= 3


def test_a_part_shares_the_fate_of_its_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shapes("probe", "cpu", "tiny")[0]
    budget = Budget(0.0, 1, 1)

    def row_of(name: str, **options: object) -> Entry:
        entries, _ = compete("probe", tiny, CPU, budget, **options)  # type: ignore[arg-type]
        return next(entry for entry in entries if entry.rival == name)

    part = row_of("probe's own kernels")
    assert part.status == "ok" and part.mode == "own time" and part.ratio is not None and part.ratio > 0
    left_out = row_of("probe's own kernels", choice=Choice(without=["forward + probe"]))
    assert left_out.status == "unavailable" and "left out" in left_out.reason
    rivals = [replace(r, make=lambda p: 1 / 0) if r.name == "forward + probe" else r for r in RIVALS["probe"]]
    monkeypatch.setitem(RIVALS, "probe", tuple(rivals))
    failed = row_of("probe's own kernels")
    assert failed.status == "failed" and "ZeroDivisionError" in failed.reason


def test_a_lent_gpu_gets_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "probe", replace(SUITES["probe"], seconds={"cpu": 0.0}))
    monkeypatch.setattr("benchmarks.runner.contest", lambda *args: budgets.append(args[2]) or contest(*args))
    budgets: list[Budget] = []
    tiny = shapes("probe", "cpu", "tiny")[0]
    compete("probe", tiny, CPU, Budget(60.0, 7))
    compete("probe", tiny, CPU, Budget(0.0, 1, 1))
    assert budgets == [Budget(0.0, 2), Budget(0.0, 1, 1)]


def test_what_does_not_fit_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shapes("probe", "cpu", "tiny")[0]
    assert isinstance(tiny, ModelShape)
    monkeypatch.setattr("benchmarks.memory.free", lambda device: eager_model.layer_memory(tiny, "cpu") - 1)
    entries, _ = compete("probe", tiny, CPU, Budget(0.0, 1, 1))
    assert [entry.status for entry in entries] == ["ok", "ok", "ok", "does not fit", "does not fit"]


def test_the_targets_of_the_4b_shape_are_read_from_its_rows() -> None:
    about = {"device_type": "cuda"}
    found = []
    for hidden, share in ((1024, 0.5), (2560, 0.012)):
        for rival, median in (("forward alone", 2.0), ("probe's own kernels", 2.0 * share)):
            dimensions = {"length": 8192, "hidden": hidden, "batch": 1}
            entry = Entry("probe", rival, "", "bfloat16", dimensions, median=median, environment=about)
            found.insert(0 if hidden == 2560 else len(found), entry)
    of_probe = [target for target in TARGETS if target.suite == "probe" and target.device == "cuda"]
    assert [(target.length, target.bound) for target in of_probe] == [(8192, 0.015), (32_768, 0.005), (131_072, 0.001)]
    assert str(verdict(of_probe[0], found)).endswith("1.20% of forward alone (at most 1.5%): met")
    for target in of_probe:  # each is about a shape that is run
        assert any(
            shape.length == target.length and all(getattr(shape, k) == v for k, v in target.layout)
            for shape in shapes("probe", "cuda", "full")
        )
