"""What needs a part of its tensors reads a part, and gives the numbers of the whole. What it costs, benchmarks say."""

from __future__ import annotations

import math

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels.backend.tiled_torch import passes
from rhythm_kernels.ops import dispatch

BACKENDS = [name for name in ("cpu", "torch") if not rk.backends()[name]]
CPU = pytest.mark.skipif(bool(rk.backends()["cpu"]), reason="the compiled passes are not built")


@pytest.mark.parametrize("function", ["moments", "fai"])
def test_torch_reads_the_rows_within_the_window_alone(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = 0
    logits = passes.logits

    def counted(*args: object) -> torch.Tensor:
        nonlocal pairs
        x = logits(*args)
        pairs += x.shape[2] * x.shape[3]
        return x

    length, left = 4096, 100
    q, k = torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8)
    lse = rk.attention_lse(q, k, window_size=(left, 0), backend="torch")
    monkeypatch.setattr(passes, "logits", counted)
    options = {"window_size": (left, 0), "backend": "torch"}
    rk.column_moments(q, k, lse, **options) if function == "moments" else rk.fai(
        q, k, lse, horizon=(4, None), **options
    )
    assert pairs <= length * (left + 256)  # 256 keys a tile; all later rows are 4.6 times that


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_behind_a_narrow_window_is_its_share_of_the_rows(backend: str) -> None:
    """Five rows of a fifth each among many hidden ones, right to 2e-6: merging a tile of hidden rows once lost 2e-3."""
    length, seen = 8192, 5
    q = torch.zeros(1, length, 1, 1)
    lse = torch.full((1, 1, length), math.log(seen))
    moments = rk.column_moments(q, q, lse, min_distance=0, window_size=(seen - 1, 0), backend=backend)
    rows = length - torch.arange(length, dtype=torch.float64)
    want = rows.clamp(max=seen) / seen / rows
    torch.testing.assert_close(moments.mean[0].double(), want, rtol=2e-6, atol=0)
    assert torch.equal(moments.count[0].double(), rows)


@CPU
@pytest.mark.parametrize("size", [1e4, 1e5, 1e7])
def test_logits_of_any_size(size: float) -> None:
    """With a scale that is no power of two, products are rounded before the largest is taken from them, or nothing is
    left of a row from 2^31 on."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        q, k = (torch.rand(1, 64, 1, 3, generator=generator) * size for _ in range(2))
        got, want = (rk.span(q, k, backend=backend) for backend in ("cpu", "torch"))
        assert got.isfinite().all()
        # Rounded differently, two logits within a unit of each other may change places: not many, and not by NaN.
        assert ((got - want).abs() < 1).double().mean() > 0.9


@CPU
def test_empty_sequences_behind_others_change_nothing() -> None:
    """`cu_seqlens` of a fixed size repeats its end; empty ones lie between sequences of one tile too."""
    q, k, lse = torch.randn(300, 4, 16), torch.randn(300, 2, 16), torch.full((4, 300), 9.0)
    plain = torch.tensor([0, 200, 208, 214, 222, 300], dtype=torch.int32)
    more = torch.cat(
        [plain[:2], plain[1:2].expand(700), plain[2:4], plain[3:4].expand(5000), plain[4:], plain[-1:].expand(900)]
    )
    for measure in (rk.waad, rk.fai):
        want = measure(q, k, lse, cu_seqlens=plain, per_head=True, backend="cpu")
        assert torch.equal(measure(q, k, lse, cu_seqlens=more, per_head=True, backend="cpu"), want)


@CPU
def test_attention_on_a_cpu_takes_the_compiled_row_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default and by name; `torch` stays torch alone, and its own pass is not a free one for the probe."""
    from rhythm_kernels.backend import cpu
    from rhythm_kernels.probe.rhythm_attention import is_one_pass

    calls = []
    row_stats = cpu.row_stats
    monkeypatch.setattr(cpu, "row_stats", lambda *args: calls.append("compiled") or row_stats(*args))
    tensors = torch.randn(3, 1, 20, 2, 8).unbind(0)
    found = [rk.attention_with_rhythm(*tensors, backend=backend) for backend in (None, "cpu")]
    assert calls == ["compiled"] * 2
    want = rk.attention_with_rhythm(*tensors, backend="torch")
    assert calls == ["compiled"] * 2
    for out, lse, stats in found:
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
        torch.testing.assert_close(stats, want[2])
    assert dispatch.choose("attention", None, torch.device("cpu")) == "cpu"
    assert not is_one_pass(torch.device("cpu"))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_q_that_overlap_by_all_but_one_element(axis: int) -> None:
    """torch's CPU attention lays its output out as q lies, and then writes two elements to one place."""
    shape = (2, 13, 2, 16)
    strides = [416, 32, 16, 1]
    strides[axis] = 1
    q = torch.randn(1000).as_strided(shape, strides)
    k, v = torch.randn(2, *shape).unbind(0)
    got = rk.attention_with_rhythm(q, k, v)
    want = rk.attention_with_rhythm(q.contiguous(), k, v)
    torch.testing.assert_close(got, want)
