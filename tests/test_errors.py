"""Bad input: an error before any kernel runs, in one grammar: `NAME must be WHAT, got VALUE`, then advice if any."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
import typing

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rhythm_kernels as rk
from rhythm_kernels import reference


def q(*shape: int, **kw) -> torch.Tensor:
    return torch.randn(*(shape or (2, 9, 4, 8)), **kw)


def check_grammar(error: BaseException, *names: str) -> None:
    """One of `names` comes first, as the caller typed it (an entry of a pair with its index)."""
    name = "|".join(names)
    assert re.match(rf"({name})(\[\d\])? must be \S.*, got \S", str(error)), str(error)


CU = torch.tensor([0, 4, 9], dtype=torch.int32)
INT = torch.int32

WRONG = [
    ({"q": "text"}, TypeError, "q must be a torch.Tensor, got str"),
    ({"q": q(9, 4, 8)}, ValueError, r"q must be \(batch, tokens, heads, head_dim\), got shape \(9, 4, 8\)"),
    ({"q": q().double()}, TypeError, "q must be float32, bfloat16 or float16, got torch.float64"),
    ({"k": q(2, 9, 2, 8).half()}, TypeError, "k must be of the dtype of q, torch.float32, got torch.float16"),
    ({"k": q(2, 8, 2, 8)}, ValueError, r"k must be of the batch and length of q, \(2, 9\), got \(2, 8\)"),
    ({"k": q(2, 9, 2, 7)}, ValueError, "k must be of the head size of q, 8, got 7"),
    ({"k": q(2, 9, 3, 8)}, ValueError, "q must be of a multiple of k's 3 heads .*, got 4 heads"),
    ({"q": q(0, 9, 4, 8), "k": q(0, 9, 2, 8)}, ValueError, "q must be non-empty, got 0 batch rows"),
    ({"q": q(2, 0, 4, 8), "k": q(2, 0, 2, 8)}, ValueError, "q must be non-empty, got 0 tokens"),
    ({"q": q(2, 9, 4, 300), "k": q(2, 9, 2, 300)}, ValueError, "q must be of a head size from 1 to 256, got 300"),
    ({"q": q().to_sparse()}, TypeError, "q must be a dense tensor, got one of layout torch.sparse_coo"),
    ({"k": torch.empty(2, 9, 2, 8, device="meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
    ({"lse": q(2, 9, 4)}, ValueError, r"lse must be .* = \(2, 4, 9\), all query heads, got shape \(2, 9, 4\)"),
    ({"lse": q(2, 4, 9).double()}, TypeError, "lse must be float32"),
    ({"heads": []}, ValueError, "heads must be at least one query head, got none"),
    ({"heads": [0, 4]}, ValueError, r"heads must be query-head indices in 0\.\.3, got 4"),
    ({"heads": [-1]}, ValueError, r"heads must be query-head indices in 0\.\.3, got -1"),
    ({"heads": [1, 1]}, ValueError, r"heads must be different query heads, got \[1, 1\]"),
    ({"heads": 2}, TypeError, "heads must be a list or an int tensor of query-head indices, got int"),
    ({"heads": [0.5]}, TypeError, "heads must be integers, got 0.5"),
    ({"heads": torch.tensor([5])}, ValueError, r"heads must be query-head indices in 0\.\.3, got 5"),
    ({"heads": torch.tensor(1).numpy()}, ValueError, r"heads must be a non-empty vector .*, got shape \(\)"),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be a float, got a number beyond all of them"),
    ({"heads": torch.tensor([1.0])}, TypeError, r"heads must be integers .*, got torch\.float32"),
    ({"heads": [torch.tensor(1.5)]}, TypeError, r"heads must be integers, got tensor\(1.5000\)"),
    ({"heads": [torch.tensor(True)]}, TypeError, r"heads must be integers, got tensor\(True\)"),
    ({"softmax_scale": 1e300}, ValueError, r"softmax_scale must be finite, at most 1e\+30, got 1e\+300"),
    ({"softmax_scale": True}, TypeError, "softmax_scale must be a float, got bool True"),
    ({"softcap": True}, TypeError, "softcap must be a float, got bool True"),
    ({"softcap": 1e-300}, ValueError, "softcap must be 0 .* got 1e-300"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, .* got nan"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float, got str"),
    ({"softcap": -1.0}, ValueError, "softcap must be 0 .* got -1.0"),
    ({"window_size": 5}, ValueError, "window_size must be a pair"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size\[0\] must be at least -1, got -2"),
    ({"window_size": (4, 4)}, ValueError, r"window_size\[1\] must be -1 or 0, got 4: .* causal"),
    ({"sinks": q(3)}, ValueError, r"sinks must be \(heads,\) = \(4,\), got shape \(3,\)"),
    ({"sinks": torch.zeros(4, dtype=INT)}, TypeError, "sinks must be floating point"),
    ({"alibi_slopes": q(3)}, ValueError,
     r"alibi_slopes must be \(heads,\) = \(4,\) or \(batch, heads\) = \(2, 4\), got shape \(3,\)"),
    ({"alibi_slopes": q(3, 4)}, ValueError, r"or \(batch, heads\) = \(2, 4\), got shape \(3, 4\)"),
    ({"alibi_slopes": q(1, 4)}, ValueError, r"or \(batch, heads\) = \(2, 4\), got shape \(1, 4\)"),
    ({"alibi_slopes": torch.zeros(4, dtype=INT)}, TypeError, "alibi_slopes must be floating point"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, "alibi_slopes must be a torch.Tensor, got list"),
    ({"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes must be on the device of q, cpu, got"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU, "alibi_slopes": q(1, 4)}, ValueError,
     r"or \(sequences, heads\) = \(2, 4\), got shape \(1, 4\)"),
    ({"seq_start": torch.tensor([0.0, 1.0])}, TypeError, "seq_start must be int32"),
    ({"seq_start": torch.tensor([0, 1, 2], dtype=INT)}, ValueError, r"seq_start must be \(batch,\) = \(2,\)"),
    ({"seq_end": torch.tensor([9, 10], dtype=INT)}, ValueError, r"seq_end must be in 0\.\.9, got 10 in batch row 1"),
    ({"seq_start": torch.tensor([3, 0], dtype=INT), "seq_end": torch.tensor([2, 9], dtype=INT)}, ValueError,
     "seq_end must be at least seq_start, 3, got 2 in batch row 0"),
    ({"response_start": [1, 2]}, TypeError, "response_start must be a torch.Tensor, got list"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU[:1]}, ValueError,
     r"cu_seqlens must be .* at least one sequence, got shape \(1,\)"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU + 1}, ValueError,
     "cu_seqlens must be from 0 to at most the total of 9 tokens, got 1..10"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": torch.tensor([0, 5, 4, 9])}, ValueError, 
     "cu_seqlens must be ascending, got 5 before 4"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU, "max_seqlen": 4}, ValueError,
     "max_seqlen must be at least the longest sequence's 5 tokens, got 4"),
    ({"max_seqlen": 5, "seq_start": torch.tensor([2, 4], dtype=INT)}, ValueError,
     "max_seqlen must be at least the longest sequence's 7 tokens, got 5"),
    ({"q": q(9, 4, 8), "k": q(9, 2, 8), "cu_seqlens": CU, "seq_end": CU[1:]}, ValueError,
     "seq_end must be None beside cu_seqlens, got a Tensor: it is for padded input"),
    ({"cu_seqlens": CU}, ValueError, r"q must be \(total, heads, head_dim\) with cu_seqlens, got shape"),
    ({"per_head": 1}, TypeError, "per_head must be a bool, got int 1"),
    ({"backend": "cublas"}, ValueError, "backend must be one of .*'torch'.* got 'cublas'"),
    ({"backend": "cuda"}, ValueError, "backend must be one that runs .* on cpu tensors, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize("measure", [rk.waad, rk.fai, rk.span, rk.column_moments])
@pytest.mark.parametrize(
    ("change", "error", "message"), WRONG, ids=lambda x: ",".join(x) if isinstance(x, dict) else None
)
def test_shared_arguments(measure, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"q": q(), "k": q(2, 9, 2, 8), **change}
    with pytest.raises(error, match=message) as caught:
        measure(arguments.pop("q"), arguments.pop("k"), arguments.pop("lse", None), **arguments)
    check_grammar(caught.value, *change, "q")  # q: which must suit the k that changed


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: rk.waad(q, k, window=0), ValueError, "window must be at least 1, got 0"),
        (lambda q, k: rk.waad(q, k, window=2.0), TypeError, "window must be an int, got float"),
        (lambda q, k: rk.waad(q, k, window=True), TypeError, "window must be an int, got bool"),
        (lambda q, k: rk.fai(q, k, horizon=10), ValueError, "horizon must be a pair"),
        (lambda q, k: rk.fai(q, k, horizon=(-1, 3)), ValueError, r"horizon\[0\] must be at least 0, got -1"),
        (lambda q, k: rk.fai(q, k, horizon=(5, 4)), ValueError, r"horizon\[1\] must be at least 5, got 4"),
        (lambda q, k: rk.column_moments(q, k, min_distance=-1), ValueError, "min_distance must be at least 0"),
        (lambda q, k: rk.attention_with_rhythm(q, k, k.half()), TypeError, "v must be of the dtype of q"),
        (lambda q, k: rk.attention_with_rhythm(q, k, k[:, 1:]), ValueError, "v must be of the layout of k"),
        (lambda q, k: rk.attention_with_rhythm(q, k, q), ValueError, "v must be of the layout of k"),
    ],
)
def test_arguments_of_one_measure(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(q(), q(2, 9, 2, 8))
    check_grammar(caught.value, "window", "horizon", "min_distance", "v")


def test_a_head_dimension_that_is_not_contiguous_is_welcome() -> None:
    a, b = q(2, 9, 8, 4).transpose(2, 3), q(2, 9, 8, 2).transpose(2, 3)
    torch.testing.assert_close(rk.waad(a, b), rk.waad(a.contiguous(), b.contiguous()))


@pytest.mark.parametrize("far", [sys.maxsize, 2**70])
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_a_distance_beyond_every_length_is_no_limit(backend: str | None, far: int) -> None:
    a, b = q(2, 30, 4, 8), q(2, 30, 2, 8)
    same = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    for lse in (None, rk.attention_lse(a, b)):
        same(rk.waad(a, b, lse, window=far, backend=backend), rk.span(a, b))
        same(rk.fai(a, b, lse, horizon=(3, far), backend=backend), rk.fai(a, b, horizon=(3, None)))
        assert not rk.fai(a, b, lse, horizon=(far, far), backend=backend).any()
        assert not rk.column_moments(a, b, lse, min_distance=far, backend=backend).count.any()


def test_fake_tensors_are_served_and_leave_no_trace() -> None:
    a, b = q(1, 9, 6, 8), q(1, 9, 2, 8)
    with FakeTensorMode() as mode:
        fake = rk.waad(mode.from_tensor(a), mode.from_tensor(b), heads=[5, 0])
    assert fake.shape == (1, 9)
    real = rk.waad(a, b, heads=[5, 0])  # no fake table of heads in a cache
    torch.testing.assert_close(real, rk.waad(a, b, heads=[5, 0], backend="reference"), atol=1e-5, rtol=0)
    with FakeTensorMode() as mode:
        rk.waad(mode.from_tensor(a), mode.from_tensor(b), heads=[5, 0])


def test_a_forward_mode_derivative_of_attention_is_refused() -> None:
    a, b = q(1, 9, 4, 8), q(1, 9, 2, 8)
    with pytest.raises(NotImplementedError, match="attention_with_rhythm has no forward-mode derivative"):
        torch.func.jvp(lambda x: rk.attention_with_rhythm(x, b, b)[0], (a,), (a,))
    slope = torch.func.jvp(lambda x: rk.attention_with_rhythm(x, b, b, backend="reference")[0], (a,), (a,))[1]
    assert slope.any()


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    code = "import torch, rhythm_kernels as rk; x = torch.randn(1, 9, 1, 16); rk.waad(x, x, backend='triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "ValueError: backend must be one that runs row_stats on cpu tensors, got 'triton'" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def test_import_needs_torch_alone_and_is_fast() -> None:
    code = (
        "import sys, time, torch; t = time.perf_counter(); import rhythm_kernels as rk; "
        "print(time.perf_counter() - t); "
        "print([m for m in ('triton', 'transformers', 'trl', 'rhythm_kernels.backend.triton') if m in sys.modules]); "
        "print(torch.cuda.is_initialized()); dir(rk)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded, cuda = run.stdout.splitlines()
    # A fraction of a second; the bound leaves room for a busy machine.
    assert float(seconds) < 2
    assert loaded == "[]" and cuda == "False"


def test_public_names_are_all_there() -> None:
    for name in rk.__all__:
        assert getattr(rk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rk.nothing  # noqa: B018


# Tensors that are not what kernels read, in every argument of every function: an error that names the argument.


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x.flatten(0), x.flatten(0)[:1]], layout=torch.jagged)


def spread(x: torch.Tensor) -> torch.Tensor:
    """A DTensor, of the one process that the test run is."""
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


STRANGE = {
    "sparse": torch.Tensor.to_sparse,
    "nested": nested,
    "DTensor": spread,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "elsewhere": lambda x: x.to("meta"),
    "an array": torch.Tensor.numpy,
}
PADDED = {"sinks": torch.zeros(4), "heads": torch.tensor([1]), "response_start": torch.tensor([0, 3]),
          "seq_start": torch.tensor([1, 0]), "seq_end": torch.tensor([9, 8])}  # fmt: skip
PACKED = {"cu_seqlens": CU, "response_start": torch.tensor([0, 3])}
MEASURES = {
    "attention_lse": (rk.attention_lse, "q k"),
    "waad": (rk.waad, "q k lse"),
    "fai": (rk.fai, "q k lse"),
    "span": (rk.span, "q k lse"),
    "column_moments": (rk.column_moments, "q k lse"),
    "attention_with_rhythm": (rk.attention_with_rhythm, "q k v"),
    "rhythm_credit": (rk.rhythm_credit, "waad fai response_mask entropy"),
    "shape_advantages": (rk.shape_advantages, "advantages gamma"),
}


def arguments_of(name: str, packed: bool) -> dict[str, torch.Tensor]:
    rows = (9,) if packed else (2, 9)
    known = {"q": q(*rows, 4, 8), "k": q(*rows, 2, 8), "v": q(*rows, 2, 6), "lse": q(*rows[:-1], 4, 9)}
    known |= {"response_mask": torch.ones(2, 9), "advantages": torch.ones(2)}
    given = {name: known.get(name, torch.ones(2, 9)) for name in MEASURES[name][1].split()}
    if name not in ("rhythm_credit", "shape_advantages"):
        given |= PACKED if packed else PADDED
    return given


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_strange_tensor_is_named_wherever_it_is(name: str, kind: str, backend: str | None) -> None:
    measure = MEASURES[name][0]
    options = {} if name == "shape_advantages" else {"backend": backend}
    for packed in (False, True):
        fine = arguments_of(name, packed)
        measure(**fine, **options)
        for argument, x in fine.items():
            if (kind, argument) == ("an array", "heads"):  # a list of integers as any
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                measure(**fine | {argument: STRANGE[kind](x)}, **options)
            # Of two that are on different devices, either may be called the one that is wrong.
            check_grammar(caught.value, *(fine if kind == "elsewhere" else [argument]))
            assert argument in str(caught.value)
            if kind == "DTensor":
                assert f"{argument}.to_local()" in str(caught.value)


FUNCTIONS = ["waad", "fai", "span", "column_moments", "attention_lse", "attention_with_rhythm"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_shown(name: str) -> None:
    """The options are declared once; `help`, completion and type hints spell them out for each function."""
    for function in (getattr(rk, name), getattr(reference, name)):
        shown = inspect.signature(function).parameters
        assert {"heads", "sinks", "alibi_slopes", "cu_seqlens", "response_start"} < shown.keys()
        assert all(x.kind is not inspect.Parameter.VAR_KEYWORD for x in shown.values())
        assert typing.get_type_hints(function).keys() - {"return"} == shown.keys()
    asked, dense = (inspect.signature(getattr(x, name)).parameters for x in (rk, reference))
    assert asked.keys() - dense.keys() == {"backend"}
    assert {x: asked[x].default for x in dense} == {x: dense[x].default for x in dense}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_argument_is_named_by_its_function(name: str) -> None:
    tensors = [q(2, 9, 2, 8)] * (3 if name == "attention_with_rhythm" else 2)
    for module in (rk, reference):
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'window_sizes'"):
            getattr(module, name)(*tensors, window_sizes=3)
