"""The registered ops: schemas and fakes (opcheck), tracing without graph breaks, CUDA-graph-safe doors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck

import rhythm_kernels as rk
from rhythm_kernels import ops
from rhythm_kernels.canonical import canonical

BACKENDS = [name for name in ("torch", "cpu") if not rk.backends()[name]]
NO_OPTIONS = {
    "softmax_scale": None, "window_size": (-1, -1), "softcap": 0.0, "sinks": None, "cu_seqlens": None,
    "max_seqlen": None, "seq_start": None, "seq_end": None, "response_start": None,
}  # fmt: skip


def sample(backend: str, per_head: bool, sinks: bool) -> dict[str, tuple[Callable, tuple]]:
    q, k, v = torch.randn(2, 21, 4, 8), torch.randn(2, 21, 2, 8), torch.randn(2, 21, 2, 6)
    options = {**NO_OPTIONS, "sinks": torch.randn(4) if sinks else None}
    form = canonical(q, k, rk.attention_lse(q, k, sinks=options["sinks"]), heads=[3, 0], **options)
    head = form.rule
    return {
        "band_rows": (ops.band_rows, (q, k, form.lse, *head, 10, per_head, backend)),
        "band_columns": (ops.band_columns, (q, k, form.lse, *head, 3, 9, per_head, backend)),
        "row_stats": (ops.row_stats, (q, k, *head, 10, per_head, backend)),
        "column_stats": (ops.column_stats, (q, k, form.lse, *head, 4, True, per_head, backend)),
        "column_stats (mean)": (ops.column_stats, (q, k, form.lse, *head, 4, False, per_head, backend)),
        "attention": (ops.attention, (q, k, v, *head, 10, per_head, "torch")),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", list(sample("torch", True, True)))
def test_opcheck(name: str, backend: str, per_head: bool, sinks: bool) -> None:
    op, args = sample(backend, per_head, sinks)[name]
    opcheck(op, args)


def test_opcheck_of_the_gradient() -> None:
    op, (q, k, v, *rest) = sample("torch", False, True)["attention"]
    opcheck(op, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), *rest))


MEASURES: dict[str, Callable] = {
    "waad": rk.waad,
    "fai": rk.fai,
    "fai, full": lambda q, k, **kw: rk.fai(q, k, horizon=(3, None), **kw),
    "span": rk.span,
    "lse": rk.attention_lse,
    "moments": rk.column_moments,
    "attention": lambda q, k, **kw: rk.attention_with_rhythm(q, k, k, **kw),
}


@pytest.mark.parametrize("options", ["padded", "packed"])
@pytest.mark.parametrize("name", list(MEASURES))
def test_compiles_without_a_graph_break(name: str, options: str) -> None:
    torch._dynamo.reset()
    measure = MEASURES[name]
    q, k = torch.randn(2, 19, 4, 8), torch.randn(2, 19, 2, 8)
    if options == "packed":
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        keywords = {"cu_seqlens": torch.tensor([0, 20, 38], dtype=torch.int32)}
    else:
        keywords = {"seq_start": torch.tensor([0, 4], dtype=torch.int32), "window_size": (7, 0)}
    compiled = torch.compile(lambda q, k, kw: measure(q, k, heads=[2, 1], **kw), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, keywords), measure(q, k, heads=[2, 1], **keywords))


def test_a_new_length_compiles_nothing_new() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: rk.waad(q, k), fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (17, 23, 64, 101):
        q, k = torch.randn(1, length, 2, 8), torch.randn(1, length, 2, 8)
        torch.testing.assert_close(compiled(q, k), rk.waad(q, k))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_beyond_the_length_does_not_cancel_when_compiled(backend: str) -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 40, 2, 8)
    lse = rk.attention_lse(q, q)
    compiled = torch.compile(
        lambda q, lse: rk.waad(q, q, lse, window=10**6, backend=backend), fullgraph=True, backend="aot_eager"
    )
    want = rk.reference.span(q.double(), q.double())
    for given in (lse, None):
        torch.testing.assert_close(compiled(q, given).double(), want, atol=1e-3, rtol=0)


def test_ops_run_on_meta_tensors() -> None:
    q, k = torch.randn(2, 1000, 4, 64, device="meta"), torch.randn(2, 1000, 2, 64, device="meta")
    assert rk.waad(q, k, backend="torch").shape == (2, 1000)
    assert rk.column_moments(q, k, per_head=True, heads=[1], backend="torch").mean.shape == (2, 1, 1000)
