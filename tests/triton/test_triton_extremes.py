"""What the passes must bear: huge strides, large logits, values that are not finite."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import ops, reference
from rhythm_kernels.canonical import canonical
from rhythm_kernels.reference.formulas import logits

from ..cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 10


def far_apart(x: Tensor, axis: int, memory: mmap.mmap) -> Tensor:
    """The same values, the last of `axis` more than 2^32 elements away from the first."""
    strides = list(x.contiguous().stride())
    strides[axis] = 2**32 // (x.shape[axis] - 1) + 64
    far = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)


@pytest.mark.skipif(DEVICE == "cuda", reason="the views lie in the host's memory")
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["q", "k", "lse"])
def test_offsets_beyond_32_bits(name: str, axis: int) -> None:
    """Every stride of every input, on anonymous memory of which a few pages alone are ever touched."""
    q, k, _ = Case("far", length=5, heads=2, kv_heads=2, dtype=torch.float16).inputs(DEVICE)
    inputs = {"q": q, "k": k, "lse": reference.attention_lse(q.double(), k.double()).float()}
    rule = canonical(q, k, None).rule

    def results(q: Tensor, k: Tensor, lse: Tensor) -> list[Tensor]:
        return [
            *ops.row_stats(q, k, *rule, WINDOW, True, "triton"),
            ops.band_rows(q, k, lse, *rule, WINDOW, True, "triton"),
            ops.band_columns(q, k, lse, *rule, 1, 3, True, "triton"),
            ops.column_stats(q, k, lse, *rule, 1, True, True, "triton"),
        ]

    x = inputs[name]
    # Nothing is set aside for it: 17 GiB of addresses.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    with mmap.mmap(-1, (2**32 + 2**12) * x.element_size(), flags=flags) as memory:
        far = far_apart(x, axis, memory)
        got = results(**inputs | {name: far})
        del far
    for value, expected in zip(got, results(**inputs), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("magnitude", [10.0, 1e4])
def test_large_logits(magnitude: float) -> None:
    """Finite, and within what a float32 log-sum-exp allows: `W max|x| 2^-22`; 1 for FAI, T for span in place of W."""
    q, k, _ = Case("large", length=100, dim=16, heads=2, kv_heads=1, batch=1).inputs(DEVICE)
    x = logits(q[0].double(), k[0].double())
    q = q * (magnitude / x[x.isfinite()].abs().max())
    bound = magnitude * 2.0**-22 + 1e-6
    q64, k64 = q.double(), k.double()
    for lse in (reference.attention_lse(q64, k64).float(), None):
        waad = rk.waad(q, k, lse, window=WINDOW, backend="triton")
        assert float((waad - reference.waad(q64, k64, window=WINDOW)).abs().max()) < WINDOW * bound
        for horizon in ((10, 50), (10, None)):
            fai = rk.fai(q, k, lse, horizon=horizon, backend="triton")
            assert float((fai - reference.fai(q64, k64, horizon=horizon)).abs().max()) < bound
    span = rk.span(q, k, backend="triton")
    assert float((span - reference.span(q64, k64)).abs().max()) < 100 * bound
    moments = rk.column_moments(q, k, backend="triton")
    assert all(bool(x.isfinite().all()) for x in moments)
    assert float((moments.mean - reference.column_moments(q64, k64).mean).abs().max()) < bound


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows_and_columns(poison: float) -> None:
    q, k, _ = Case("poison", batch=2, length=80, heads=2, kv_heads=1).inputs(DEVICE)

    def measures(q: Tensor, k: Tensor, lse: Tensor) -> dict[str, Tensor]:
        return {
            "waad": rk.waad(q, k, lse, backend="triton"), "span": rk.span(q, k, backend="triton"),
            "fai": rk.fai(q, k, lse, horizon=(10, 30), backend="triton"),
            "mean": rk.column_moments(q, k, lse, backend="triton").mean,
        }  # fmt: skip

    lse = rk.attention_lse(q, k, backend="triton")
    clean = measures(q, k, lse)
    position = torch.arange(80, device=DEVICE)
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[0, 40], bad_k[0, 40] = poison, float("nan")
    # Row 40 of the first sequence; the keys that have row 40 among their rows.
    of_row = {"waad": position == 40, "span": position == 40}
    of_row |= {"fai": (position <= 30) & (position >= 10), "mean": position <= 36}
    # Key 40; the rows that see it, in the band and anywhere.
    of_key = {"fai": position == 40, "mean": position == 40}
    of_key |= {"waad": (position >= 40) & (position < 50), "span": position >= 40}
    for got, touched in ((measures(bad_q, k, lse), of_row), (measures(q, bad_k, lse), of_key)):
        for name, want in clean.items():
            torch.testing.assert_close(got[name][1], want[1])
            torch.testing.assert_close(got[name][0][~touched[name]], want[0][~touched[name]])
            assert not bool(got[name][0][touched[name]].isfinite().all()), name


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44, 7e-46, 1e-46, -1e-44, 0.0])
def test_scales_below_the_normal_numbers(scale: float) -> None:
    """All logits are 0 then, and the log-sum-exp is that of a count."""
    case = Case("tiny scale", length=40, options={"softmax_scale": scale})
    q, k, options = case.inputs(DEVICE)
    lse = reference.attention_lse(q.double(), k.double(), **options).float()
    for horizon in ((3, 25), (3, None)):
        got = rk.fai(q, k, lse, horizon=horizon, backend="triton", **options)
        want = reference.fai(q.double(), k.double(), horizon=horizon, **options)
        assert (got.double() - want).abs().max() < 1e-4
