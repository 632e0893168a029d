"""Whatever traces or transforms a call: compilers, exporters, fake tensors, functorch. Every function, every layout.

What a trace computes is what the ordinary call computes, and it leaves nothing behind that a later call would find.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rhythm_kernels as rk
from rhythm_kernels import canonical, sequences
from rhythm_kernels.settings import CREDIT_MODES

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# What a caller brings beside q, k, v `(2, 13, ...)`: tensors are inputs of the trace, all else is constant.
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"seq_start": ints(0, 4), "seq_end": ints(11, 13), "response_start": ints(5, 2)},
    "packed": {"cu_seqlens": ints(0, 7, 7, 26), "response_start": ints(3, 0, -1)},
    "packed, room at the end": {"cu_seqlens": ints(0, 10, 22), "max_seqlen": 12},
    "packed, max_seqlen a tensor": {"cu_seqlens": ints(0, 10, 26), "max_seqlen": torch.tensor(16)},
    "options": {"heads": ints(3, 0), "sinks": torch.tensor([0.5, -1.0, 2, 0]), "window_size": (7, 0), "softcap": 9.0},
}  # fmt: skip


def without_v(measure: Callable) -> Callable:
    return lambda q, k, v, lse, **options: measure(q, k, **options)


def with_lse(measure: Callable) -> Callable:
    return lambda q, k, v, lse, **options: measure(q, k, lse, **options)


MEASURES: dict[str, Callable] = {
    "attention_lse": without_v(rk.attention_lse),
    "waad": with_lse(rk.waad),
    "waad, no lse": without_v(rk.waad),
    "fai": with_lse(rk.fai),
    "fai, no lse": lambda q, k, v, lse, **options: rk.fai(q, k, horizon=(2, 6), **options),
    "fai, open": lambda q, k, v, lse, **options: rk.fai(q, k, lse, horizon=(2, None), **options),
    "span": without_v(rk.span),
    "column_moments": with_lse(rk.column_moments),
    "attention_with_rhythm": lambda q, k, v, lse, **options: rk.attention_with_rhythm(q, k, v, **options),
}


def measured(name: str, layout: str) -> tuple[Callable, list[Tensor]]:
    """A function of tensors alone, and those tensors."""
    options = LAYOUTS[layout]
    q, k, v = torch.randn(2, 13, 4, 8), torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 6)
    if "cu_seqlens" in options:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    rule = {name: x for name, x in options.items() if name not in ("heads", "response_start")}
    lse = rk.attention_lse(q, k, **rule)
    given = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    constant = {name: x for name, x in options.items() if name not in given}

    def call(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *tensors: Tensor) -> Any:
        return MEASURES[name](q, k, v, lse, **constant, **dict(zip(given, tensors)))

    return call, [q, k, v, lse, *given.values()]


def credit(mode: str) -> tuple[Callable, list[Tensor]]:
    mask = torch.ones(2, 9)
    mask[0, 6:] = 0

    def call(waad: Tensor, fai: Tensor, entropy: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        seeded = None if mode != "random" else torch.Generator().manual_seed(3)
        gamma = rk.rhythm_credit(waad, fai, mask, mode, entropy=entropy, generator=seeded)
        return rk.shape_advantages(advantages, gamma, "positive")

    return call, [torch.rand(2, 9), torch.rand(2, 9), torch.rand(2, 9), mask, torch.tensor([1.0, -2.0])]


CASES: dict[str, Callable[[], tuple[Callable, list[Tensor]]]] = {
    **{
        f"{name} | {layout}": lambda name=name, layout=layout: measured(name, layout)
        for name in MEASURES
        for layout in LAYOUTS
    },
    **{f"credit | {mode}": lambda mode=mode: credit(mode) for mode in CREDIT_MODES if mode != "random"},
}


def compiled(f: Callable, *x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)(*x)


def exported(f: Callable, *x: Tensor) -> Any:
    class Module(torch.nn.Module):
        def forward(self, *x: Tensor) -> Any:
            return f(*x)

    return torch.export.export(Module(), x).module()(*x)


def fake(f: Callable, *x: Tensor) -> Any:
    with FakeTensorMode() as mode:
        return f(*map(mode.from_tensor, x))


def traced(mode: str) -> Callable:
    return lambda f, *x: make_fx(f, tracing_mode=mode)(*x)(*x)


# The ways that give values, and those that give shapes.
COMPUTED: dict[str, Callable] = {
    "compile": compiled,
    "export": exported,
    "make_fx real": traced("real"),
    "make_fx fake": traced("fake"),
    "make_fx symbolic": traced("symbolic"),
    "functionalize": lambda f, *x: torch.func.functionalize(f)(*x),
    "vmap": lambda f, *x: pytree.tree_map(lambda y: y[0], torch.func.vmap(f)(*(y[None] for y in x))),
}
SHAPED: dict[str, Callable] = {"fake tensors": fake, "meta": lambda f, *x: f(*(y.to("meta") for y in x))}


@pytest.mark.parametrize("way", [*COMPUTED, *SHAPED])
@pytest.mark.parametrize("case", CASES)
def test_every_function_and_layout(case: str, way: str) -> None:
    f, tensors = CASES[case]()
    want = f(*tensors)
    if way in COMPUTED:
        torch.testing.assert_close(COMPUTED[way](f, *tensors), want, rtol=0, atol=1e-6)
    else:
        got, expected = pytree.tree_leaves(SHAPED[way](f, *tensors)), pytree.tree_leaves(want)
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
    torch.testing.assert_close(f(*tensors), want, rtol=0, atol=0)  # nothing of the trace is met again


# Sizes and integers that only the data tell: rows chosen by a mask, `.item()`. A plain torch.compile keeps them.


@pytest.fixture
def data_dependent() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


def unpadded(measure: Callable) -> Callable:
    """The measure of what is left of a padded batch without its padding, whose total nobody knows in advance."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Any:
        live = mask.flatten().nonzero().squeeze(1)
        q, k, v = (x.flatten(0, 1).index_select(0, live) for x in (q, k, v))
        lse = rk.attention_lse(q, k, cu_seqlens=cu_seqlens)
        return measure(q, k, v, lse, cu_seqlens=cu_seqlens)

    return call


def padded_batch() -> list[Tensor]:
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 8:] = False
    return [torch.randn(2, 13, 4, 8), torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 6), mask, ints(0, 8, 21)]


@pytest.mark.usefixtures("data_dependent")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEASURES)
def test_a_total_that_the_data_decide(name: str, backend: str) -> None:
    torch._dynamo.reset()
    f, tensors = unpadded(MEASURES[name]), padded_batch()
    got = torch.compile(f, backend=backend, fullgraph=True)(*tensors)
    torch.testing.assert_close(got, f(*tensors), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("data_dependent")
def test_gradients_of_a_total_that_the_data_decide() -> None:
    torch._dynamo.reset()
    f, (*qkv, mask, cu_seqlens) = unpadded(MEASURES["attention_with_rhythm"]), padded_batch()

    def gradients(call: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(call(*leaves, mask, cu_seqlens)[0].square().sum(), leaves)

    got = gradients(torch.compile(f, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(got, gradients(f), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=["batch", "tokens", "both"])
@pytest.mark.parametrize("name", MEASURES)
def test_sizes_marked_as_unknown(name: str, dims: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    f, tensors = measured(name, "plain")
    want = f(*tensors)
    for dim in dims:
        for x in tensors[:3]:
            torch._dynamo.decorators.mark_unbacked(x, dim)
        torch._dynamo.decorators.mark_unbacked(tensors[3], 2 if dim else 0)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("data_dependent")
def test_a_size_that_turns_out_wrong_is_found_before_a_kernel_reads_it() -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, cu_seqlens: Tensor) -> Tensor:
        chosen = (x[live.nonzero().squeeze(1)] for x, live in ((q, queries), (k, keys)))
        return rk.waad(*chosen, cu_seqlens=cu_seqlens)

    call = torch.compile(f, backend="aot_eager", fullgraph=True)
    q, k, some, fewer = torch.randn(26, 4, 8), torch.randn(26, 2, 8), torch.arange(26) < 20, torch.arange(26) < 9
    torch.testing.assert_close(call(q, k, some, some, ints(0, 20)), f(q, k, some, some, ints(0, 20)))
    with pytest.raises(RuntimeError, match="Runtime assertion failed for expression Eq"):
        call(q, k, some, fewer, ints(0, 20))


ITEMS: dict[str, Callable] = {
    "max_seqlen": lambda q, k, v, lse, cu, n: rk.waad(q, k, lse, cu_seqlens=cu, max_seqlen=n),
    "max_seqlen of attention": lambda q, k, v, lse, cu, n: rk.attention_with_rhythm(
        q, k, v, cu_seqlens=cu, max_seqlen=n, window=n
    ),
    "window": lambda q, k, v, lse, cu, n: rk.waad(q, k, lse, cu_seqlens=cu, window=n),
    "window, no lse": lambda q, k, v, lse, cu, n: rk.waad(q, k, cu_seqlens=cu, window=n),
    "horizon": lambda q, k, v, lse, cu, n: rk.fai(q, k, lse, cu_seqlens=cu, horizon=(n - 12, n)),
    "horizon, open": lambda q, k, v, lse, cu, n: rk.fai(q, k, lse, cu_seqlens=cu, horizon=(n, None)),
    "min_distance": lambda q, k, v, lse, cu, n: rk.column_moments(q, k, lse, cu_seqlens=cu, min_distance=n),
    "window_size": lambda q, k, v, lse, cu, n: rk.span(q, k, cu_seqlens=cu, window_size=(n, 0)),
}


@pytest.mark.usefixtures("data_dependent")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ITEMS)
def test_integers_that_the_data_decide(name: str, backend: str) -> None:
    torch._dynamo.reset()
    *tensors, _ = measured("attention_with_rhythm", "packed")[1]

    def f(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, cu: Tensor) -> Any:
        return ITEMS[name](q, k, v, lse, cu, (cu[1:] - cu[:-1]).max().item())

    got = torch.compile(f, backend=backend, fullgraph=True)(*tensors)
    torch.testing.assert_close(got, f(*tensors), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("data_dependent")
def test_the_neighbors_of_credit_may_be_decided_by_the_data() -> None:
    torch._dynamo.reset()
    waad, fai, mask = torch.rand(2, 19), torch.rand(2, 19), torch.ones(2, 19)

    def f(waad: Tensor, fai: Tensor, mask: Tensor, n: Tensor) -> Tensor:
        return rk.rhythm_credit(waad, fai, mask, neighbors=n.item())

    got = torch.compile(f, backend="aot_eager", fullgraph=True)(waad, fai, mask, torch.tensor(5))
    assert torch.equal(got, rk.rhythm_credit(waad, fai, mask, neighbors=5))


def test_an_exported_program_takes_other_lengths() -> None:
    f, (q, k, v, lse) = measured("waad", "plain")

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Any:
            return f(q, k, v, lse)

    tokens = torch.export.Dim("tokens")
    dims = ({1: tokens}, {1: tokens}, {1: tokens}, {2: tokens})
    program = torch.export.export(
        Module(), (q, k, v, lse), dynamic_shapes={"q": dims[0], "k": dims[1], "v": dims[2], "lse": dims[3]}
    )
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 6)
    lse = rk.attention_lse(q, k)
    torch.testing.assert_close(program.module()(q, k, v, lse), f(q, k, v, lse), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["symbolic", "fake"])
@pytest.mark.parametrize("name", [name for name in ITEMS if "max_seqlen" not in name])
def test_an_integer_in_a_tensor_stays_one_in_the_graph(name: str, mode: str) -> None:
    """Traced at one value it serves another."""
    *tensors, _ = measured("attention_with_rhythm", "packed")[1]

    def f(*x: Tensor) -> Any:
        return ITEMS[name](*x)

    graph = make_fx(f, tracing_mode=mode)(*tensors, torch.tensor(13))
    torch.testing.assert_close(graph(*tensors, torch.tensor(15)), f(*tensors, 15), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [np.array([2, 0]), ints(2, 0)], ids=["array", "tensor"])
def test_heads_on_the_host_are_constants_of_a_compiled_call(heads: Any) -> None:
    torch._dynamo.reset()
    q, k, _, lse = measured("waad", "plain")[1]
    call = torch.compile(lambda *x: rk.waad(*x, heads=heads, per_head=True), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(q, k, lse), rk.waad(q, k, lse, heads=[2, 0], per_head=True), rtol=0, atol=1e-6)
    elsewhere = call(*(x.to("meta") for x in (q, k, lse)))
    assert elsewhere.shape == (2, 2, 13) and elsewhere.device.type == "meta"


def test_selective_checkpointing_recomputes_what_it_saved() -> None:
    """It tells operators apart by their order: they are the same at the first call in a process and at later ones."""
    q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)

    def f(x: Tensor) -> Tensor:
        rk.waad(q, k)
        return (x.sin() * torch.full_like(torch.arange(2, dtype=torch.int32), 3)[:, None, None, None]).sum()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        view = any(word in str(op) for word in ("squeeze", "view", "detach"))
        return CheckpointPolicy.PREFER_RECOMPUTE if view else CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    (want,) = torch.autograd.grad(f(x := q.clone().requires_grad_()), x)
    sequences.unpadded_table.cache_clear()
    canonical._head_tables.cache_clear()
    for _ in range(2):
        loss = checkpoint(f, x := q.clone().requires_grad_(), use_reentrant=False, context_fn=contexts)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivatives_that_torch_func_takes_are_refused_by_name(transform: str) -> None:
    q, k = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8)
    apply = {
        "grad": lambda f: torch.func.grad(lambda q: f(q).sum())(q),
        "jvp": lambda f: torch.func.jvp(f, (q,), (q,))[1],
    }[transform]
    with pytest.raises(NotImplementedError, match=r"attention_with_rhythm has no .*derivative"):
        apply(lambda q: rk.attention_with_rhythm(q, k, k)[0])
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"no (forward-mode )?derivative|functorch transforms"):
        torch.compile(lambda: apply(lambda q: rk.attention_with_rhythm(q, k, k)[0]), backend="eager", fullgraph=True)()
    assert apply(lambda q: rk.attention_with_rhythm(q, k, k, backend="reference")[0]).any()
