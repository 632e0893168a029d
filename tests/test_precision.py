"""The torch backend's products keep float32's precision, and the caller its settings, whatever those allow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rhythm_kernels as rk
from rhythm_kernels import reference
from rhythm_kernels.backend import tiled_torch
from rhythm_kernels.backend.tiled_torch import tiles
from rhythm_kernels.canonical import canonical

aten = torch.ops.aten
PRODUCTS = {
    aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addbmm, aten.mv, aten.dot, aten._int_mm,
    aten._scaled_dot_product_flash_attention_for_cpu,
}  # fmt: skip
NO_OPTIONS = {
    "sinks": None, "cu_seqlens": None, "max_seqlen": None, "seq_start": None, "seq_end": None, "response_start": None,
}  # fmt: skip


class Products(TorchDispatchMode):
    """Records the dtypes of the operands of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.dtypes += [x.dtype for x in args if isinstance(x, Tensor)]
        return func(*args, **(kwargs or {}))


def settings() -> dict[str, str]:
    return {
        "legacy": torch._C._get_float32_matmul_precision(),
        "all": torch.backends.fp32_precision,
        "cuda": torch.backends.cuda.matmul.fp32_precision,
        "cpu": torch.backends.mkldnn.matmul.fp32_precision,
    }


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def passes(dtype: torch.dtype, softcap: float) -> dict[str, tuple]:
    """Name -> arguments of every pass of the torch backend that multiplies, its gradient included."""
    q, k, v = (torch.randn(2, 21, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    form = canonical(
        q, k, rk.attention_lse(q, k, softcap=softcap), heads=None, softmax_scale=None, window_size=(-1, -1),
        softcap=softcap, **NO_OPTIONS,
    )  # fmt: skip
    out, lse, _, _ = tiled_torch.attention(q, k, v, form.rule, 10, False)
    return {
        "band_rows": (q, k, form.lse, form.rule, 10, False),
        "band_columns": (q, k, form.lse, form.rule, 3, 9, False),
        "row_stats": (q, k, form.rule, 10, False),
        "column_stats": (q, k, form.lse, form.rule, 4, True, False),
        "attention": (q, k, v, form.rule, 10, False),
        "attention_backward": (out, q, k, v, out, lse, form.rule),
    }


def run(name: str, *args: Any) -> Any:
    """The pass of the torch backend, whose products a mode sees; inside of an op it would not."""
    with torch.no_grad():
        return getattr(tiled_torch, name)(*args)


NAMES = ["band_rows", "band_columns", "row_stats", "column_stats", "attention", "attention_backward"]


@pytest.mark.parametrize("softcap", [0.0, 5.0])  # without one attention is torch's own on the CPU
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_product_of_float32_operands(name: str, softcap: float, precision: str) -> None:
    args = passes(torch.float32, softcap)[name]
    want = run(name, *args)
    torch.set_float32_matmul_precision(precision)
    before = settings()
    with Products() as products:
        got = run(name, *args)
    assert set(products.dtypes) == {torch.float64}
    assert settings() == before
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_multiplied_as_float32(name: str) -> None:
    """No setting of reduced-precision reductions applies: what has 16 bits is raised first."""
    args = passes(torch.bfloat16, 5.0)[name]
    with Products() as products:
        run(name, *args)
    assert set(products.dtypes) == {torch.float32}


def set_all(value: str) -> None:
    torch.backends.fp32_precision = value


def set_cpu(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


def set_cuda(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_allow_tf32(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


SETTINGS: list[tuple[Callable, Any, bool, bool]] = [  # setter, value, whether the CPU rounds, whether CUDA does
    (torch.set_float32_matmul_precision, "highest", False, False),
    (torch.set_float32_matmul_precision, "high", True, True),
    (torch.set_float32_matmul_precision, "medium", True, True),
    (set_allow_tf32, True, False, True),
    (set_cuda, "tf32", False, True),
    (set_cuda, "ieee", False, False),
    (set_cpu, "bf16", True, False),
    (set_cpu, "tf32", True, False),
    (set_all, "tf32", True, True),
    (set_all, "ieee", False, False),
]


@pytest.mark.parametrize(("setter", "value", "cpu", "cuda"), SETTINGS)
def test_every_setting_is_seen(setter: Callable, value: Any, cpu: bool, cuda: bool) -> None:
    """Those of both interfaces; the getters of the older one raise where the newer has been used."""
    setter(value)
    assert tiles.rounds_operands(torch.device("cpu")) == cpu
    assert tiles.rounds_operands(torch.device("cuda")) == cuda
    assert not tiles.rounds_operands(torch.device("mps"))  # has no float64, nor such a setting


def test_settings_stay_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    args = passes(torch.float32, 5.0)["row_stats"]

    def broken(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    torch.set_float32_matmul_precision("medium")
    before = settings()
    monkeypatch.setattr(torch, "matmul", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("row_stats", *args)
    assert settings() == before


def test_another_thread_sees_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are the process's: while a pass multiplies, another thread's own products are as it said."""
    args = passes(torch.float32, 5.0)["row_stats"]
    torch.set_float32_matmul_precision("medium")
    before, seen, matmul = settings(), [], torch.matmul

    def watched(a: Tensor, b: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: seen.append(settings()))
        other.start(), other.join()
        return matmul(a, b)

    monkeypatch.setattr(torch, "matmul", watched)
    run("row_stats", *args)
    assert seen and all(found == before for found in seen)


def test_a_compiled_call_follows_the_setting_of_the_moment() -> None:
    """The setting is read inside of the op, not while it is traced."""
    q, k = torch.randn(1, 21, 4, 8), torch.randn(1, 21, 2, 8)
    compiled = torch.compile(lambda q, k: rk.span(q, k, backend="torch"), backend="aot_eager", fullgraph=True)
    want = reference.span(q.double(), k.double())
    for precision in ("highest", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        assert (compiled(q, k).double() - want).abs().max() < 1e-4
        with Products() as products:
            run("row_stats", *passes(torch.float32, 5.0)["row_stats"])
        assert set(products.dtypes) == {torch.float64 if precision == "medium" else torch.float32}
