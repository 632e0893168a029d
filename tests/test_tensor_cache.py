"""Small tables are made once and reused, and never where a later call would find the wrong thing in them."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import rhythm_kernels as rk
from rhythm_kernels import canonical, sequences, tensor_cache
from rhythm_kernels.tensor_cache import TensorCache

CACHES = (sequences.unpadded_table, canonical._head_tables)


@pytest.fixture(autouse=True)
def _fresh():
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def inputs():
    q, k = torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    return q, k, rk.reference.attention_lse(q, k)


class Launches(TorchDispatchMode):
    """Count the operators between the call and the pass that compute: each is a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        ours = "rhythm_kernels" in func._schema.name
        if not (func.is_view or ours or name in ("empty", "empty_like", "new_empty", "detach")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(q, k, lse, **options) -> list[str]:
    """What is launched to bring one call's arguments to canonical form, as on a GPU, where no value is read."""
    arguments = dict.fromkeys(
        ("heads", "softmax_scale", "sinks", "cu_seqlens", "max_seqlen", "seq_start", "seq_end", "response_start")
    )
    arguments |= {"window_size": (-1, -1), "softcap": 0.0, **options}
    with pytest.MonkeyPatch.context() as patch:
        for module in (canonical, sequences):
            patch.setattr(module, "readable", lambda _: False)
        patch.setattr(tensor_cache, "watched", lambda: False)  # else nothing is cached while this mode counts
        canonical.canonical(q, k, lse, **arguments)
        with Launches() as counted:
            canonical.canonical(q, k, lse, **arguments)
    return counted.names


def test_launches_of_a_call(inputs):
    q, k, lse = inputs
    vector = torch.tensor([3, 4], dtype=torch.int32)
    assert launches(q, k, lse) == []
    assert launches(q, k, lse, heads=[1]) == []
    assert len(launches(q, k, lse, response_start=vector)) <= 3
    assert len(launches(q, k, lse, seq_start=vector, seq_end=vector + 5, response_start=vector)) <= 3
    assert len(launches(q, k, lse, heads=torch.tensor([0, 1], dtype=torch.int32))) <= 2
    cu = torch.tensor([0, 5, 24], dtype=torch.int32)
    packed = q.flatten(0, 1), k.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert len(launches(*packed, cu_seqlens=cu)) <= 4
    assert len(launches(*packed, cu_seqlens=cu, response_start=vector)) <= 7


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_a_gpu_is_given_is_brought_into_range(inputs, dtype, monkeypatch):
    """Values that the host does not read: whatever they are, `start <= response_start <= end` within the row."""
    q, _, _ = inputs
    for module in (canonical, sequences):
        monkeypatch.setattr(module, "readable", lambda _: False)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    some = torch.tensor([low, -1, 0, 3, 11, 12, 13, high], dtype=dtype)
    start, end, first = (x.flatten() for x in torch.meshgrid(some, some, some, indexing="ij"))
    wide = q[:1].expand(len(start), -1, -1, -1)
    table = sequences._padded_table(start, end, first, wide)
    assert table.dtype == torch.int32
    row, s, e, f = table.unbind(1)
    assert torch.equal(row, torch.arange(len(start), dtype=torch.int32))
    assert ((s >= 0) & (s <= f) & (f <= e) & (e <= 12)).all()
    fine = (start >= 0) & (start <= end) & (end <= 12)
    assert torch.equal(s[fine], start[fine].int())
    assert torch.equal(e[fine], end[fine].int())
    assert torch.equal(f[fine], torch.minimum(torch.maximum(first, start), end)[fine].int())
    cu = torch.tensor([low, 5, 3, high, 7, 24], dtype=dtype)
    counted = torch.tensor([high, low, 2, 1, 4], dtype=dtype)
    packed = sequences._packed_table(cu, counted, 24, q.device)
    assert packed.tolist() == [[0, 0, 5, 5], [0, 5, 5, 5], [0, 5, 24, 7], [0, 24, 24, 24], [0, 24, 24, 24]]


def test_one_table_serves_later_calls(inputs):
    q, k, lse = inputs
    rk.waad(q, k, lse)
    table, heads = sequences.unpadded_table(2, 12, q.device), canonical._head_tables((0, 1), q.device)
    rk.fai(q, k, lse)
    assert sequences.unpadded_table(2, 12, q.device) is table
    assert canonical._head_tables((0, 1), q.device) is heads
    assert table.tolist() == [[0, 0, 12, 0], [1, 0, 12, 0]]


def test_the_one_unused_for_longest_goes_first():
    cache = TensorCache(lambda n, device: torch.full((1,), n, device=device), 2, launches=True)
    device = torch.device("cpu")
    one = cache(1, device)
    cache(2, device)
    assert cache(1, device) is one
    cache(3, device)  # in the place of 2
    assert cache(1, device) is one
    assert len(cache._entries) == 2


def fake(f, *x):
    with FakeTensorMode() as mode:
        return f(*map(mode.from_tensor, x))


def export(f, *x):
    class Module(torch.nn.Module):
        def forward(self, *x):
            return f(*x)

    return torch.export.export(Module(), x)


TRANSFORMS = {
    "compile": lambda f, *x: torch.compile(f, backend="aot_eager", fullgraph=True)(*x),
    "export": export,
    "make_fx real": lambda f, *x: make_fx(f, tracing_mode="real")(*x),
    "make_fx fake": lambda f, *x: make_fx(f, tracing_mode="fake")(*x),
    "make_fx symbolic": lambda f, *x: make_fx(f, tracing_mode="symbolic")(*x),
    "fake tensors": fake,
    "vmap": lambda f, *x: torch.func.vmap(f)(*(y[None].expand(3, *y.shape) for y in x)),
    "grad": lambda f, q, k, lse: torch.func.grad(lambda q: f(q, k, lse).sum() + q.sum())(q),
    "jvp": lambda f, q, k, lse: torch.func.jvp(lambda q: f(q, k, lse), (q,), (q,)),
    "functionalize": lambda f, *x: torch.func.functionalize(f)(*x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nothing_is_cached_under(name, inputs):
    """Nor is anything read there: a real tensor in a fake graph is an error, in a traced one a constant."""
    q, k, lse = inputs

    def measure(q, k, lse):
        return rk.waad(q, k, lse, heads=[1])

    torch._dynamo.reset()
    TRANSFORMS[name](measure, q, k, lse)
    assert not any(cache._entries for cache in CACHES)
    want = measure(q, k, lse)
    held = [dict(cache._entries) for cache in CACHES]
    assert all(held)
    torch._dynamo.reset()
    TRANSFORMS[name](measure, q, k, lse)
    assert [dict(cache._entries) for cache in CACHES] == held
    assert torch.equal(measure(q, k, lse), want)
    q.requires_grad_()
    rk.attention_with_rhythm(q, k, k, heads=[1])[0].sum().backward()


def test_inference_mode_leaves_tensors_that_a_backward_pass_can_save(inputs):
    q, k, _ = inputs
    with torch.inference_mode():
        rk.attention_with_rhythm(q, k, k)
    for cache in CACHES:
        ((table, _),) = cache._entries.values()
        assert not table.is_inference()
    q.requires_grad_()
    rk.attention_with_rhythm(q, k, k)[0].sum().backward()
    assert q.grad.isfinite().all()


class Weighed(torch.Tensor):
    pass


def test_subclasses_get_their_own(inputs):
    q, _, _ = inputs
    canonical._head_tables.like(q.as_subclass(Weighed), (0, 1))
    assert not canonical._head_tables._entries


class Gpu:
    """What `TensorCache` asks of torch.cuda."""

    def __init__(self, monkeypatch):
        self.capturing, self.stream = False, 7
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("S", (), {"cuda_stream": self.stream}))


@pytest.mark.parametrize("launches", [True, False])
def test_streams_and_graph_capture(launches, monkeypatch):
    """A table is read on the stream that wrote it; a capture keeps nothing, and what it reads stays for its replays."""
    gpu, device = Gpu(monkeypatch), torch.device("cuda", 0)
    cache = TensorCache(lambda n, device: torch.full((1,), n), 1, launches)
    gpu.capturing = True
    assert cache(1, device) is not cache(1, device)
    assert not cache._entries
    gpu.capturing = False
    first = cache(1, device)
    assert cache(1, device) is first
    gpu.stream = 8
    assert (cache(1, device) is first) is not launches
    read = cache(1, device)
    gpu.capturing, gpu.stream = True, 9
    assert cache(1, device) is read
    gpu.capturing = False
    cache(2, device)
    assert len(cache._entries) == 1
    assert list(cache._read_by_graphs.values()) == [read]


def test_threads_that_fill_a_table_do_not_disturb_each_other():
    """More keys than it keeps, from many threads that change places at every chance."""
    tensors = [torch.full((1,), n) for n in range(23)]
    table = TensorCache(lambda n, device: tensors[n], 4, launches=False)
    wrong, errors, device = [], [], torch.device("cpu")

    def work(first):
        try:
            for i in range(2000):
                n = (first + i) % 23
                if table(n, device) is not tensors[n]:
                    wrong.append(n)
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(7 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong and not errors


class Recorded:
    """A tensor that tells how it was copied, since no second device is here."""

    def __init__(self, device):
        self.device = torch.device(device)

    def to(self, device, non_blocking):
        self.copied = device.type, non_blocking
        return self


@pytest.mark.parametrize(("source", "target", "waits"), [("cpu", "cuda:0", False), ("cuda:0", "cpu", True)])
def test_a_table_that_goes_to_the_host_is_waited_for(source, target, waits):
    seqs = Recorded(source)
    sequences.SequenceTable(seqs, 3, False).to(torch.device(target))
    assert seqs.copied == (torch.device(target).type, not waits)
