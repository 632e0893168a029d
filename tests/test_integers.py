"""Integers near the ends of their types: the right value, or an error that names the argument, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import canonical, reference, sequences

from . import bounds
from .backends import BANDED, CREDITING, backend, bands, credit, cuda_on_cpu, device_of

__all__ = ["backend", "bands", "cuda_on_cpu"]  # fixtures

B, T, H, D = 2, 12, 2, 16
INT32 = [2**31 - 1, 2**31 - 2, -(2**31), -(2**31) + 1]
INT64 = [2**63 - 1, 2**63 - 2, 2**62, 2**32, -(2**63), -(2**63) + 1, -(2**62), *INT32]
FAR = [2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 + 3, 10**30]  # distances, which Python does not bound
ENDS = [(torch.int32, x) for x in INT32] + [(torch.int64, x) for x in INT64]


def drawn(backend: str, packed: bool = False) -> tuple[Tensor, Tensor, dict[str, Any]]:
    q, k = torch.randn(B, T, H, D), torch.randn(B, T, 1, D)
    options: dict[str, Any] = {}
    if packed:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        options["cu_seqlens"] = torch.tensor([0, 9, 15, B * T], device=device_of(backend))
    return q.to(device_of(backend)), k.to(device_of(backend)), options


def measures(module: Any, q: Tensor, k: Tensor, options: dict[str, Any], **more: Any) -> list[Tensor]:
    """Bands alone, which every backend has, from an lse of every live row."""
    lse = reference.attention_lse(q.double(), k.double(), **{n: x for n, x in options.items() if "response" not in n})
    if module is rk:
        lse = lse.float()
    else:
        q, k = q.double(), k.double()
    waad = module.waad(q, k, lse, **options, **more)
    return [waad, module.fai(q, k, lse, horizon=(1, 5), **options, **more)]


@pytest.mark.parametrize(("dtype", "value"), ENDS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_response_start(backend: str, packed: bool, dtype: torch.dtype, value: int) -> None:
    """Past the end nothing is measured, before the start everything."""
    q, k, options = drawn(backend, packed)
    starts = torch.tensor([3, value, 2] if packed else [value, 3], dtype=dtype, device=q.device)
    got = measures(rk, q, k, options | {"response_start": starts}, backend=backend)
    small = starts.clamp(-1, T)
    want = measures(reference, q, k, options | {"response_start": small})
    for a, b, bound in zip(got, want, (bounds.waad(10), bounds.fai()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=0)
    first = got[0][9:15] if packed else got[0][0]
    assert bool(first.any()) == (value < 0)


@pytest.mark.parametrize(("dtype", "value"), ENDS, ids=str)
@pytest.mark.parametrize("name", ["seq_start", "seq_end", "cu_seqlens", "heads"])
def test_values_out_of_range_are_named(name: str, dtype: torch.dtype, value: int) -> None:
    q, k, options = drawn("cpu", packed=name == "cu_seqlens")
    entries = [value, 1] if name != "cu_seqlens" else [0, value, B * T]
    for each in ("reference", "torch", "cpu"):
        with pytest.raises(ValueError, match=name):
            rk.waad(q, k, **options | {name: torch.tensor(entries, dtype=dtype)}, backend=each)


@pytest.mark.parametrize("heads", [[2**31], [-(2**31)], [2**63], [-(2**63)], [10**30]], ids=str)
def test_heads_out_of_range_are_named(heads: list[int]) -> None:
    q, k, _ = drawn("cpu")
    for each in ("reference", "torch", "cpu"):
        with pytest.raises(ValueError, match=r"heads must be query-head indices in 0\.\.1"):
            rk.waad(q, k, heads=heads, backend=each)


@pytest.mark.parametrize("value", INT64, ids=str)
def test_values_that_are_not_read_are_clamped(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every table entry within its row and its order, whatever the argument holds."""
    for module in (canonical, sequences):
        monkeypatch.setattr(module, "readable", lambda _: False)
    q, k, _ = drawn("cpu")
    arguments: dict[str, Any] = dict.fromkeys(
        ("heads", "softmax_scale", "sinks", "cu_seqlens", "max_seqlen", "seq_start", "seq_end", "response_start")
    )
    arguments |= {"window_size": (-1, -1), "softcap": 0.0}
    for dtype in (torch.int64, torch.int32):
        if dtype == torch.int32 and value not in INT32:
            continue
        ends = torch.tensor([value, 5], dtype=dtype)
        for name in ("seq_start", "seq_end", "response_start"):
            row, start, end, first = canonical.canonical(q, k, None, **arguments | {name: ends}).rule.seqs.unbind(1)
            assert row.tolist() == [0, 1]
            assert (start >= 0).all() and (start <= first).all() and (first <= end).all() and (end <= T).all()
            column = {"seq_start": start, "seq_end": end, "response_start": first}[name]
            assert column.tolist() == [min(max(value, 0), T), 5]
        packed = (q.flatten(0, 1), k.flatten(0, 1))
        bounds = torch.tensor([0, value, B * T], dtype=dtype)
        form = canonical.canonical(*packed, None, **arguments | {"cu_seqlens": bounds, "response_start": ends})
        middle = min(max(value, 0), B * T)
        assert form.rule.seqs[:, 1:3].tolist() == [[0, middle], [middle, B * T]]
        assert form.rule.seqs[:, 3].tolist() == [middle if value > 0 else 0, min(middle + 5, B * T)]
        form = canonical.canonical(q, k, None, **arguments | {"heads": torch.tensor([value], dtype=dtype)})
        assert form.rule.heads.tolist() == [[min(max(value, 0), H - 1)] * 2]


@pytest.mark.parametrize("far", FAR, ids=str)
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_distances_beyond_every_length(backend: str, far: int) -> None:
    q, k, _ = drawn(backend)
    lse = reference.attention_lse(q, k)
    q64, k64, given = q.double(), k.double(), {"backend": backend}

    def same(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=0)

    same(rk.waad(q, k, lse, window=far, **given), reference.waad(q64, k64, window=T))
    same(rk.fai(q, k, lse, horizon=(2, far), **given), reference.fai(q64, k64, horizon=(2, None)))
    same(rk.waad(q, k, lse, window_size=(far, 0), **given), reference.waad(q64, k64))
    same(rk.fai(q, k, lse, horizon=(1, 5), window_size=(far, -1), **given), reference.fai(q64, k64, horizon=(1, 5)))
    assert not rk.fai(q, k, lse, horizon=(far, far), **given).any()
    same(rk.waad(q, k, lse, max_seqlen=far, **given), reference.waad(q64, k64))
    if backend == "cuda":
        return
    same(rk.waad(q, k, window=far, **given), reference.waad(q64, k64, window=T))
    same(rk.span(q, k, window_size=(far, 0), **given), reference.span(q64, k64))
    assert not rk.fai(q, k, lse, horizon=(far, None), **given).any()
    same(rk.column_moments(q, k, window_size=(far, 0), **given).mean, reference.column_moments(q64, k64).mean)
    assert not rk.column_moments(q, k, lse, min_distance=far, **given).count.any()
    same(rk.attention_lse(q, k, window_size=(far, 0), **given), reference.attention_lse(q64, k64))
    if backend != "cpu":
        out, _, stats = rk.attention_with_rhythm(q, k, k, window=far, window_size=(far, 0), **given)
        same(out, reference.attention_with_rhythm(q64, k64, k64)[0])
        same(stats.waad, reference.span(q64, k64))


@pytest.mark.parametrize("far", FAR, ids=str)
def test_distances_beyond_every_length_in_the_definitions(far: int) -> None:
    q, k, _ = drawn("cpu")
    same = torch.testing.assert_close
    same(reference.waad(q, k, window=far, window_size=(far, 0)), reference.waad(q, k, window=T))
    same(reference.fai(q, k, horizon=(2, far)), reference.fai(q, k, horizon=(2, None)))
    assert not reference.fai(q, k, horizon=(far, None)).any()
    assert not reference.column_moments(q, k, min_distance=far).count.any()
    out, _, stats = reference.attention_with_rhythm(q, k, k, window=far, window_size=(far, 0))
    same(out, reference.attention_with_rhythm(q, k, k)[0])
    same(stats.waad, reference.span(q, k))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("far", FAR, ids=str)
def test_max_seqlen(far: int, packed: bool) -> None:
    q, k, options = drawn("cpu", packed)
    for each in ("reference", "torch", "cpu"):
        got = rk.waad(q, k, max_seqlen=far, **options, backend=each)
        assert torch.equal(got, rk.waad(q, k, **options, backend=each))


@pytest.mark.parametrize("far", FAR, ids=str)
@pytest.mark.parametrize("backend", CREDITING, indirect=True)
def test_neighbors_beyond_every_length(backend: str, far: int) -> None:
    waad, fai, mask = torch.rand(2, 20), torch.rand(2, 20), torch.ones(2, 20)
    got = credit(backend, waad, fai, mask, neighbors=far)
    assert torch.equal(got, reference.rhythm_credit(waad, fai, mask, neighbors=20))
