"""Triton's `attention_with_rhythm` beside the case list: layouts, large logits, compilation, other tiles."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import rhythm_kernels as rk
from rhythm_kernels import ops, reference
from rhythm_kernels.backend.triton import configs
from rhythm_kernels.canonical import canonical

from ..cases import Case, attend, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sample(**options: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """q, k, v in canonical form, and the arguments of the op from `seqs` to `sinks`."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, 21, heads, size, generator=generator).to(DEVICE) for heads, size in ((4, 8), (2, 8), (2, 6))
    )
    form = canonical(q, k, None, heads=[3, 0], **options)
    return [q, k, v], form.rule


@pytest.mark.parametrize(
    ("options", "per_head"),
    [({}, False), ({"sinks": torch.ones(4, device=DEVICE), "window_size": (5, 0), "softcap": 2.0}, True)],
    ids=["plain", "rules"],
)
def test_opcheck(options: dict[str, Any], per_head: bool) -> None:
    (q, k, v), rule = sample(**options)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    opcheck(ops.attention, (*leaves, *rule, 10, per_head, "triton"))
    out, lse, _, _ = ops.attention(q.detach(), k.detach(), v.detach(), *rule, 10, per_head, "triton")
    opcheck(
        torch.ops.rhythm_kernels.attention_backward.default,
        (torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, lse, *rule, "triton"),
    )


@pytest.mark.parametrize("options", ["padded", "packed"])
def test_compiles_without_a_graph_break(options: str) -> None:
    torch._dynamo.reset()
    (q, k, v), _ = sample()
    keywords: dict[str, Any] = {
        "seq_start": torch.tensor([0, 4], dtype=torch.int32, device=DEVICE),
        "window_size": (7, 0),
    }
    if options == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        keywords = {"cu_seqlens": torch.tensor([0, 20, 42], dtype=torch.int32, device=DEVICE)}

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse, stats = rk.attention_with_rhythm(q, k, v, heads=[2, 1], backend="triton", **keywords)
        return out.square().sum(), lse, stats.waad, stats.span

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        loss, *rest = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *rest, *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def gradients(q: Tensor, k: Tensor, v: Tensor, upstream: Callable[[Tensor], Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, _, _ = rk.attention_with_rhythm(*leaves, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def test_any_strides() -> None:
    """q, k, v and the upstream gradient in any layout give the bits of contiguous ones."""
    (q, k, v), _ = sample()
    upstream = torch.randn(2, 21, 4, 6, device=DEVICE)
    want = gradients(q, k, v, lambda out: upstream)
    fused = torch.cat([q, k, torch.cat([v, v], dim=-1)[..., :8]], dim=2).transpose(1, 2).contiguous().transpose(1, 2)
    views = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:, :6]
    assert all(not x.is_contiguous() for x in views)
    last = v.transpose(2, 3).contiguous().transpose(2, 3)  # the head dimension strided
    for tensors in (views, (q, k, last)):
        for seen in (lambda x: x, lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)):
            for got, expected in zip(gradients(*tensors, lambda out, seen=seen: seen(upstream)), want, strict=True):
                assert torch.equal(got, expected)


def test_expanded_gradients() -> None:
    """`out.sum().backward()` hands over one number with strides of 0; `out[..., :1].expand` one number a row."""
    (q, k, v), _ = sample()
    for shape in ((1, 1, 1, 1), (2, 21, 4, 1)):
        values = torch.randn(shape, device=DEVICE)
        want = gradients(q, k, v, lambda out, values=values: values.expand_as(out).contiguous())
        for got, expected in zip(
            gradients(q, k, v, lambda out, values=values: values.expand_as(out)), want, strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "rules", [{}, {"window_size": (40, 0)}, {"sinks": torch.full((2,), -300.0)}], ids=["", "window", "sink"]
)
def test_large_logits(rules: dict[str, Any]) -> None:
    """Finite, and no further from the definition than a float32 log-sum-exp allows, for logits of either sign."""
    magnitude = 1e4
    q, k, v = (torch.randn(1, 75, heads, 16, device=DEVICE) for heads in (2, 1, 1))
    rules = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in rules.items()}
    for shift in (0.0, -1.0, 1.0):
        # A constant direction in which all logits lie at -magnitude or magnitude, beside a spread of 1 in the others.
        big_q, big_k = q.clone(), k.clone()
        if shift:
            big_q[..., 0], big_k[..., 0] = 2 * magnitude**0.5, 2 * shift * magnitude**0.5
        else:
            big_q *= magnitude / 8
        tensors = [big_q, big_k, v, torch.randn(1, 75, 2, 16, device=DEVICE)]
        want = attend(reference.attention_with_rhythm, tensors, torch.float64, **rules)
        got = attend(rk.attention_with_rhythm, tensors, torch.float32, backend="triton", **rules)
        largest = float(want[1].abs().max())
        for name, g, w in zip(want._fields, got, want, strict=True):
            scale = {"waad": 10.0, "span": 75.0, "lse": 1.0}.get(name, 1 + float(w.abs().max()))
            scale *= {"dq": float(big_k.abs().max()), "dk": float(big_q.abs().max())}.get(name, 1.0)
            error = float((g.double() - w).abs().max())
            assert error <= scale * (largest * 2.0**-21 + 1e-5), f"{name} at {shift}: {error:.3g} of {scale:.3g}"


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's own tiles have these shapes")
@pytest.mark.parametrize(("rows", "keys"), [(64, 16), (16, 64)])
def test_tiles_that_are_not_square(rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a row may see no key of its tile's first keys, and all its logits may lie far below 0."""
    for name in ("attention", "attention_alone", "attention_dq", "attention_dkv", "row_stats"):
        monkeypatch.setitem(configs.TILES["interpreter"], name, {(32, 256): configs.Tile(rows, keys, 1, 1)})
    options = {"window_size": (21, 0), "softcap": 4.0, "heads": [1]}
    triton = ("triton", DEVICE, ("attention", "row_stats"))
    check(Case("oblong", batch=1, length=130, heads=2, kv_heads=2, sinks=True, options=options), *triton)
    check(Case("oblong, no rule", batch=1, length=130, heads=2, kv_heads=1, window=40), *triton)
    q, k = torch.randn(1, 100, 1, 16), torch.randn(1, 100, 1, 16)
    q[..., 0], k[..., 0] = 100.0, -100.0
    want = reference.attention_with_rhythm(q.double(), k.double(), k.double(), window_size=(3, 0))
    out, lse, stats = rk.attention_with_rhythm(q, k, k, window_size=(3, 0), backend="triton")
    torch.testing.assert_close(out.double(), want[0], atol=0.1, rtol=0)
    span = rk.span(q, k, window_size=(3, 0), backend="triton")
    for got, expected in ((lse, want[1]), (stats.span, want[2].span), (span, want[2].span)):
        torch.testing.assert_close(got.double(), expected, atol=0.01, rtol=0)


def test_what_is_not_finite_stays_in_its_rows() -> None:
    (q, k, v), _ = sample()
    clean = rk.attention_with_rhythm(q, k, v, per_head=True, backend="triton")
    bad = q.clone()
    bad[0, 7, 1] = float("nan")
    out, lse, stats = rk.attention_with_rhythm(bad, k, v, per_head=True, backend="triton")
    touched = torch.zeros(2, 21, 4, dtype=torch.bool, device=DEVICE)
    touched[0, 7, 1] = True
    assert out[touched].isnan().all() and torch.equal(out[~touched], clean[0][~touched])
    by_head = touched.transpose(1, 2)
    for got, want in ((lse, clean[1]), (stats.waad, clean[2].waad), (stats.span, clean[2].span)):
        assert got[by_head].isnan().all() and torch.equal(got[~by_head], want[~by_head])


def test_same_bits_every_time() -> None:
    case = Case("repeated", length=40, batch=1, dtype=torch.bfloat16)
    q, k, _ = case.inputs(DEVICE)
    tensors = (q, k, *case.values(q, k))
    first = attend(rk.attention_with_rhythm, tensors, case.dtype, backend="triton")
    for _ in range(2):
        for got, want in zip(attend(rk.attention_with_rhythm, tensors, case.dtype, backend="triton"), first):
            assert torch.equal(got, want)


def test_a_repeated_head_leaves_no_output_unwritten() -> None:
    """A head tensor on a GPU is not read by the host, and may name a head twice: out covers every head all the same."""
    (q, k, v), (seqs, _, *rest) = sample()
    want = ops.attention(
        q,
        k,
        v,
        seqs,
        torch.tensor([[h, h] for h in range(4)], dtype=torch.int32, device=DEVICE),
        *rest,
        10,
        True,
        "triton",
    )
    twice = torch.tensor([[1, 1], [1, 1], [2, 2], [1, 1]], dtype=torch.int32, device=DEVICE)
    got = ops.attention(q, k, v, seqs, twice, *rest, 10, True, "triton")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.isfinite(got[2]).all() and torch.isfinite(got[3]).all()


def test_offsets_beyond_32_bits() -> None:
    """Views whose strides pass 2^31 elements, on anonymous memory of which a few pages alone are ever touched."""
    length, stride, size = 5, 2**29 + 16, 16
    q, k, v, upstream = (torch.randn(1, length, 1, size, device=DEVICE).half() for _ in range(4))
    want = attend(rk.attention_with_rhythm, [q, k, v, upstream], torch.float16, backend="triton")
    with mmap.mmap(-1, 2 * ((length - 1) * stride + size)) as memory:
        far = torch.frombuffer(memory, dtype=torch.float16).as_strided(q.shape, (length * stride, stride, size, 1))
        for i, tensor in enumerate((q, k, v, upstream)):
            far.copy_(tensor)
            tensors = [q, k, v, upstream]
            tensors[i] = far
            for got, expected in zip(attend(rk.attention_with_rhythm, tensors, torch.float16, backend="triton"), want):
                assert torch.equal(got, expected)
        del far, tensors
