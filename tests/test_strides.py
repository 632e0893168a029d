"""Any strides: what a function gives does not depend on how its tensors lie in memory, nor on what lies beside them.

Each row names a function, a backend and one of its inputs, which is laid out in every way of `LAYOUTS`; results and
gradients are held to the dense float64 definition on contiguous copies. A layout lies in memory that is full of NaN
wherever the tensor is not, so that to read outside of it shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import ops, reference
from rhythm_kernels.canonical import canonical

from .backends import ATTENDING, BANDED, CREDITING, MEASURING, backend, bands, credit, cuda_on_cpu, device_of

__all__ = ["backend", "bands", "cuda_on_cpu"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")  # Triton's

B, T, H, H_KV, D, D_V = 2, 13, 2, 1, 16, 8  # small, as Triton is interpreted


def in_memory_of(x: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
    """The values of x with these strides, `offset` elements into memory that is NaN (or -1) wherever x is not."""
    size = offset + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 64
    memory = torch.full((size,), float("nan") if x.is_floating_point() else -1, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides, offset).copy_(x)


def permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Contiguous once its dimensions are in `order`, the innermost last."""
    strides, step = [0] * x.dim(), 1
    for axis in reversed(order):
        strides[axis], step = step, step * x.shape[axis]
    return in_memory_of(x, tuple(strides), 0)


def expanded(x: Tensor, axis: int) -> Tensor:
    """The first entry of an axis in the place of all: stride 0."""
    return permuted(x.narrow(axis, 0, 1), tuple(range(x.dim()))).expand_as(x)


def overlapping(x: Tensor) -> Tensor:
    """Neighbours along the first axis of size above 1 share all but one element of memory."""
    axis = next(i for i, n in enumerate(x.shape) if n > 1)
    strides = list(x.contiguous().stride())
    strides[axis] = 1
    return x.contiguous().as_strided(x.shape, strides)


# Name -> the same values, or for `expanded` and `overlapping` some others, laid out so.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "innermost dimension first": lambda x: permuted(x, (x.dim() - 1, *range(x.dim() - 1))),
    "dimensions in reverse": lambda x: permuted(x, tuple(reversed(range(x.dim())))),
    "every second element": lambda x: in_memory_of(x, tuple(2 * s for s in x.contiguous().stride()), 0),
    "a slice at an odd offset": lambda x: in_memory_of(x, x.new_empty((*x.shape[:-1], x.shape[-1] + 3)).stride(), 5),
    "expanded innermost": lambda x: expanded(x, -1),
    "expanded second": lambda x: expanded(x, min(1, x.dim() - 1)),
    "overlapping": overlapping,
}  # fmt: skip
# Those beside which the values of an index table stay what they were.
SAME_VALUES = [name for name in LAYOUTS if not name.startswith(("expanded", "overlapping"))]


# Those that Triton's interpreter and the CUDA emulation, a second a call, have time for.
QUICK = ["innermost dimension first", "a slice at an odd offset", "expanded innermost"]


def drawn(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(B, T, heads, size, generator=generator).to(device, dtype)
        for heads, size in ((H, D), (H_KV, D), (H_KV, D_V), (H, D_V))
    )
    sinks = torch.randn(H, generator=generator).to(device)
    lse = reference.attention_lse(q.double(), k.double(), sinks=sinks.double()).float()
    return {"q": q, "k": k, "v": v, "grad": grad, "lse": lse, "sinks": sinks}


# Name -> the function, its tensors in order, its options.
MEASURES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "waad": ("waad", ("q", "k", "lse", "sinks"), {}),
    "waad without lse": ("waad", ("q", "k", "sinks"), {}),
    "fai": ("fai", ("q", "k", "lse", "sinks"), {"horizon": (2, 9)}),
    "fai, open": ("fai", ("q", "k", "lse", "sinks"), {"horizon": (2, None)}),
    "span": ("span", ("q", "k", "sinks"), {}),
    "column_moments": ("column_moments", ("q", "k", "lse", "sinks"), {}),
    "attention_lse": ("attention_lse", ("q", "k", "sinks"), {}),
}
ROWS = [
    pytest.param(name, each, tensor, id=f"{name}-{each}-{tensor}")
    for name, (_, tensors, _) in MEASURES.items()
    for each in (BANDED if name in ("waad", "fai") else MEASURING)
    for tensor in tensors
]


def call(module: Any, function: str, given: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Results, one head each, so that no mean hides one."""
    keywords = {name: x for name, x in given.items() if name == "sinks"} | options
    if function != "attention_lse":
        keywords["per_head"] = True
    result = getattr(module, function)(*(x for name, x in given.items() if name != "sinks"), **keywords)
    return result if isinstance(result, tuple) else (result,)


def layouts(backend: str, dtype: torch.dtype) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """All of them for float32; the first for the types whose kernels differ in how they load alone."""
    names = QUICK[:1] if dtype != torch.float32 else QUICK if backend in ("triton", "cuda") else list(LAYOUTS)
    return [(name, LAYOUTS[name]) for name in names]


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float, where: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        message = functools.partial(lambda i, text: f"{where}, result {i}: {text}", i)
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance, msg=message)


@pytest.mark.parametrize(("name", "backend", "tensor"), ROWS, indirect=["backend"])
def test_measures(name: str, backend: str, tensor: str) -> None:
    function, tensors, options = MEASURES[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        every = drawn(dtype, device_of(backend))
        for layout, lay in layouts(backend, dtype):
            given = {each: every[each] for each in tensors}
            given[tensor] = lay(given[tensor])
            copies = {each: x.double().contiguous() for each, x in given.items()}
            if "lse" in tensors and tensor != "lse":  # the lse of these q and k
                copies["lse"] = reference.attention_lse(copies["q"], copies["k"], sinks=copies["sinks"])
                given["lse"] = copies["lse"].float()
            got = call(rk, function, given, options | {"backend": backend})
            if tensor == "lse" and layout not in SAME_VALUES:  # the lse of none
                copies = {each: x.contiguous() for each, x in given.items()}
                want = call(rk, function, copies, options | {"backend": backend})
            else:
                want = call(reference, function, copies, options)
            n = 3 if function == "column_moments" else 1  # standardised, rounding would be compared
            same(got[:n], want[:n], 1e-4, f"{dtype}, {layout}")


@pytest.mark.parametrize(
    ("rule", "tensor"),
    [("plain", x) for x in ("q", "k", "v", "grad")] + [("every rule", x) for x in ("q", "k", "v", "grad", "sinks")],
)
@pytest.mark.parametrize("backend", ATTENDING, indirect=True)
def test_attention_and_its_gradient(rule: str, tensor: str, backend: str) -> None:
    """`plain` is torch's own operator on a CPU, which knows neither sinks nor values of another size."""
    device = device_of(backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        every = drawn(dtype, device)
        if rule == "plain":
            # A key head for every query head: those of a group are copied.
            every |= {name: torch.randn_like(every["q"]) for name in ("k", "v", "grad")}
        for layout, lay in layouts(backend, dtype):
            given = every | {tensor: lay(every[tensor])}
            rules = {} if rule == "plain" else {"softcap": 5.0, "window_size": (11, 0)}

            def results(module: Any, given: dict[str, Tensor], rules: dict = rules, **more: Any) -> tuple[Tensor, ...]:
                leaves = [given[name].detach().requires_grad_() for name in "qkv"]
                sinks = {"sinks": given["sinks"]} if rules else {}
                out, lse, stats = module.attention_with_rhythm(*leaves, per_head=True, **rules, **sinks, **more)
                return out.detach(), lse, *stats, *torch.autograd.grad(out, leaves, given["grad"])

            got = results(rk, given, backend=backend)
            want = results(reference, {name: x.double().contiguous() for name, x in given.items()})
            tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
            same(got, want, tolerance, f"{dtype}, {layout}")


def test_nothing_is_copied_that_lies_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head dimension that is contiguous is read where it is, whatever the other strides."""
    seen = []
    module = ops.dispatch._module("torch")
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args: seen.extend(args[:3]) or attention(*args))
    q, k, v = (permuted(torch.randn(B, T, heads, D), (0, 2, 1, 3)) for heads in (H, H_KV, H_KV))
    rk.attention_with_rhythm(q, k, v, backend="torch")
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]
    assert not q.is_contiguous()


def test_what_lies_beside_a_tensor_is_not_read() -> None:
    memory = torch.full((B * T * H + 4096,), 1e3)
    q = memory[: B * T * H].normal_().view(B, T, H, 1).expand(B, T, H, D)
    k = torch.randn(B, T, H, D)
    before = rk.attention_with_rhythm(q, k, k)[0].clone()
    memory[B * T * H :] = -1e3
    assert torch.equal(rk.attention_with_rhythm(q, k, k)[0], before)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, each) for name in ("band_rows", "band_columns", "row_stats", "column_stats") for each in MEASURING[1:]]
    + [("attention", each) for each in ATTENDING[1:]],
    indirect=["backend"],
)
def test_ops_called_directly(name: str, backend: str) -> None:
    """`torch.ops.rhythm_kernels.*` has no door: every tensor of an op, its tables and gradient too, all at once."""
    every = drawn(torch.float32, device_of(backend))
    form = canonical(
        every["q"], every["k"], every["lse"], heads=[1, 0], softmax_scale=None, window_size=(-1, -1), softcap=0.0,
        sinks=every["sinks"], cu_seqlens=None, max_seqlen=None,
        seq_start=torch.tensor([0, 3], device=every["q"].device), seq_end=None, response_start=None,
    )  # fmt: skip
    rule = form.rule
    assert rule.sinks is not None
    tensors = every | {"lse": form.lse, "seqs": rule.seqs, "heads": rule.heads, "sinks": rule.sinks}
    streamed = {"row_stats": ("q", "k"), "attention": ("q", "k", "v")}.get(name, ("q", "k", "lse"))
    last = {"band_rows": (5,), "band_columns": (2, 9), "row_stats": (5,), "column_stats": (2, True), "attention": (5,)}

    def results(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = [given[each].detach().requires_grad_(name == "attention") for each in streamed]
        table = rule._replace(**{each: given[each] for each in ("seqs", "heads", "sinks")})
        got = getattr(torch.ops.rhythm_kernels, name)(*leaves, *table, *last[name], True, backend)
        if name != "attention":
            return got if isinstance(got, tuple) else (got,)
        return *(x.detach() for x in got), *torch.autograd.grad(got[0], leaves, given["grad"])

    want = results(tensors)
    for layout in QUICK if backend == "triton" else LAYOUTS:
        if layout in SAME_VALUES:
            got = results({each: LAYOUTS[layout](x) for each, x in tensors.items()})
            same(got, want, 1e-5, layout)


TABLES = {
    "padded": {"seq_start": [2, 0], "seq_end": [T, T - 3], "response_start": [5, 4], "heads": [1, 0]},
    "packed": {"cu_seqlens": [0, 11, 12, B * T], "response_start": [3, 0, 7], "heads": [1, 0]},
}


@pytest.mark.parametrize("table", [f"{kind}-{name}" for kind, tables in TABLES.items() for name in tables])
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_tables(backend: str, table: str) -> None:
    kind, name = table.split("-")
    every = drawn(torch.float32, device_of(backend))
    q, k = (every[each].flatten(0, 1) if kind == "packed" else every[each] for each in "qk")
    for dtype in (torch.int32, torch.int64):
        tables = {each: torch.tensor(x, dtype=dtype, device=q.device) for each, x in TABLES[kind].items()}
        ranges = {each: x for each, x in tables.items() if each not in ("heads", "response_start")}
        lse = reference.attention_lse(q.double(), k.double(), **ranges)
        want = reference.waad(q.double(), k.double(), lse, **tables)
        fai = reference.fai(q.double(), k.double(), lse, horizon=(2, 9), **tables)
        for layout, lay in layouts(backend, torch.float32 if dtype == torch.int32 else torch.float16):
            if layout in SAME_VALUES:
                given = tables | {name: lay(tables[name]), "backend": backend}
                got = rk.waad(q, k, lse.float(), **given), rk.fai(q, k, lse.float(), horizon=(2, 9), **given)
                same(got, (want, fai), 1e-4, f"{dtype}, {layout}")


@pytest.mark.parametrize("tensor", ["waad", "fai", "response_mask", "entropy"])
@pytest.mark.parametrize("backend", CREDITING, indirect=True)
def test_credit(backend: str, tensor: str) -> None:
    for dtype in (torch.float32, torch.float64):
        measures = {name: torch.rand(3, 30).to(dtype) for name in ("waad", "fai", "entropy")}
        measures["response_mask"] = torch.rand(3, 30) > 0.2
        for layout, lay in layouts(backend, dtype):
            x = measures[tensor]
            laid = lay(x.byte()).view(torch.bool) if x.dtype == torch.bool else lay(x)
            given = measures | {tensor: laid}
            for mode in ("coupled", "entropy"):
                order = ("waad", "fai", "response_mask")
                got = credit(backend, *(given[name] for name in order), mode=mode, entropy=given["entropy"])
                want = reference.rhythm_credit(
                    *(given[name].contiguous() for name in order), mode=mode, entropy=given["entropy"].contiguous()
                )
                assert torch.equal(got, want), f"{dtype}, {layout}, {mode}"


def test_credit_called_directly() -> None:
    waad, fai, score = (torch.rand(3, 30) for _ in range(3))
    mask = torch.rand(3, 30) > 0.2
    rule = ("entropy", 1.5, 0.4, 0.5, 3, False, None, None)
    for each in ("torch", "cpu"):
        if rk.backends()[each]:
            continue
        want = ops.credit(waad, fai, score, mask, *rule, each)
        for layout in SAME_VALUES:
            lay = LAYOUTS[layout]
            got = ops.credit(*map(lay, (waad, fai, score)), lay(mask.byte()).view(torch.bool), *rule, each)
            assert torch.equal(got, want), f"{each}, {layout}"


@pytest.mark.parametrize("tensor", ["advantages", "gamma"])
def test_shape_advantages(tensor: str) -> None:
    given = {"advantages": torch.randn(4, 9), "gamma": 1 + torch.rand(4, 9)}
    for layout, lay in LAYOUTS.items():
        laid = given | {tensor: lay(given[tensor])}
        copies = {name: x.contiguous() for name, x in laid.items()}
        assert torch.equal(rk.shape_advantages(**laid), rk.shape_advantages(**copies)), layout
