"""What needs a part of its tensors costs a part: counted, and where only a clock sees it, far from the bound."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels import fallback
from rhythm_kernels.ops import dispatch

CPU = pytest.mark.skipif(bool(rk.backends()["cpu"]), reason="the compiled passes are not built")


def times(*calls: Callable[[], object]) -> list[float]:
    """The least CPU time of each, taken in turns, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [float("inf")] * len(calls)
    try:
        for _ in range(7):
            for i, call in enumerate(calls):
                begin = time.process_time()
                call()
                found[i] = min(found[i], time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("function", ["moments", "fai"])
def test_torch_reads_the_rows_within_the_window_alone(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = 0
    logits = fallback.logits

    def counted(*args: object) -> torch.Tensor:
        nonlocal pairs
        x = logits(*args)
        pairs += x.shape[2] * x.shape[3]
        return x

    length, left = 4096, 100
    q, k = torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8)
    lse = rk.attention_lse(q, k, window_size=(left, 0), backend="torch")
    monkeypatch.setattr(fallback, "logits", counted)
    rule = {"window_size": (left, 0), "backend": "torch"}
    rk.column_moments(q, k, lse, **rule) if function == "moments" else rk.fai(q, k, lse, horizon=(4, None), **rule)
    assert pairs <= length * (left + 256)  # 256 keys a tile; all later rows are 4.6 times that


@CPU
@pytest.mark.parametrize("function", ["moments", "fai"])
def test_compiled_columns_behind_a_window_cost_what_its_rows_cost(function: str) -> None:
    """1.1 times; to the end of the sequence it was 25 times."""
    q, k = torch.randn(1, 8192, 2, 32), torch.randn(1, 8192, 1, 32)
    rule = {"window_size": (127, 0), "backend": "cpu"}
    lse = rk.attention_lse(q, k, **rule)
    columns: Callable[[], object] = lambda: rk.column_moments(q, k, lse, **rule)  # noqa: E731
    if function == "fai":
        columns = lambda: rk.fai(q, k, lse, horizon=(10, None), **rule)  # noqa: E731
    of_columns, of_rows = times(columns, lambda: rk.span(q, k, **rule))
    assert of_columns < 5 * of_rows


@CPU
@pytest.mark.parametrize("function", ["waad", "fai"])
def test_compiled_short_sequences_share_tiles(function: str) -> None:
    """1.0 and 1.2 times one long sequence; with a tile each it was 2.9 and 3.0 times."""
    q, k, lse = torch.randn(8192, 4, 64), torch.randn(8192, 2, 64), torch.full((4, 8192), 9.0)
    one, many = (torch.arange(0, 8193, step, dtype=torch.int32) for step in (8192, 8))

    def run(ends: torch.Tensor) -> torch.Tensor:
        options = {"cu_seqlens": ends, "backend": "cpu"}
        return rk.waad(q, k, lse, **options) if function == "waad" else rk.fai(q, k, lse, horizon=(0, 7), **options)

    of_many, of_one = times(lambda: run(many), lambda: run(one))
    assert of_many < 2.2 * of_one


@CPU
def test_attention_on_a_cpu_takes_the_compiled_row_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default and by name; `torch` stays torch alone, and its own pass is not a free one for the probe."""
    from rhythm_kernels import native
    from rhythm_kernels.probe.attention import is_one_pass

    calls = []
    row_stats = native.row_stats
    monkeypatch.setattr(native, "row_stats", lambda *args: calls.append("compiled") or row_stats(*args))
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
