"""A measured forward on a GPU makes the host wait for nothing, and what could not be read there is not lost.

There is no GPU here: tensors are fake, with the device "cuda" where torch was built with CUDA, and any read of a
value (`bool`, `item`, `nonzero`) raises. They are fake CPU tensors, too, and the probe is told not to read them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups, tensor_cache
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe import capture, checks, forward_sequences, inputs, layer_call, layer_window, lse

from . import flash_standin
from . import probe_models as models

GROUPS = HeadGroups(local=[(0, 0), (2, 1)], global_=[(1, 0), (3, 3)])
CUDA = torch.version.cuda is not None
register()
LLAMA4 = {
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "num_local_experts": 2,
    "attention_chunk_size": 16,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "pad_token_id": 0,
}


def forbid_reading(monkeypatch):
    """Have every device be one that the host must not wait for."""
    for module in (checks, forward_sequences, layer_window, lse, inputs):
        monkeypatch.setattr(module, "reads_now", lambda device: False)


@pytest.fixture(params=["cuda", "cpu"])
def device(request, monkeypatch):
    if request.param == "cuda" and not CUDA:
        pytest.skip("this torch was built without CUDA, and cannot index fake CUDA tensors")
    if request.param == "cpu":
        forbid_reading(monkeypatch)
    return request.param


class NoWaiting(TorchDispatchMode):
    """Raise where a copy between the host and another device would make the host wait; fake tensors raise at reads."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not (kwargs or {}).get("non_blocking", False) and "cpu" in (source.device.type, result.device.type)
            assert source.device == result.device or not waits, f"{source.device} to {result.device}"
        return result


def fake_model(family, implementation, device, **overrides):
    with torch.device(device):
        return models.tiny_model(family, implementation, **overrides)


def batch_of(layout, device):
    batch = {"input_ids": torch.randint(3, 97, (2, 40), device=device)}
    response = None
    if layout != "unpadded":
        batch["attention_mask"] = torch.ones(2, 40, dtype=torch.long, device=device)
    if layout == "left":
        batch["attention_mask"][0, :7] = 0
    if layout == "right with a response":
        batch["attention_mask"][1, -5:] = 0
        response = torch.ones(2, 40, dtype=torch.bool, device=device)
        response[:, :11] = False
    return batch, response


@pytest.mark.parametrize(
    ("family", "training", "implementation", "layout"),
    [
        *itertools.product(["qwen3"], [False, True], ["sdpa", "eager"], ["unpadded", "left", "right with a response"]),
        ("mistral", False, "sdpa", "left"),
        ("mistral", True, "eager", "unpadded"),
        ("gemma3_text", False, "sdpa", "right with a response"),
        ("llama4_text", False, "sdpa", "unpadded"),
        ("llama4_text", False, "eager", "left"),
        ("llama4_text", False, "sdpa", "right with a response"),
    ],
)
def test_nothing_is_read(family, training, implementation, layout, device):
    with FakeTensorMode():
        overrides = LLAMA4 if family == "llama4_text" else {}
        model = fake_model(family, implementation, device, **overrides).train(training)
        batch, response = batch_of(layout, device)
        with torch.set_grad_enabled(training), RhythmProbe(model, GROUPS, response_mask=response) as probe:
            logits = model(**batch, use_cache=False).logits
            assert logits.requires_grad == training
            if training and device == "cpu":  # autograd wants the device's context
                logits.float().logsumexp(-1).sum().backward()
    for measure in (probe.waad, probe.fai):
        assert (measure.shape, measure.dtype, measure.device.type) == ((2, 40), torch.float32, device)


@pytest.mark.parametrize("layout", ["unpadded", "left", "right with a response"])
def test_the_probe_copies_nothing_from_the_host(layout, device, monkeypatch):
    """Head tables aside, which are copied once a process; only what the probe itself does is watched."""
    measure = capture.Capture._measure

    def watched(self, *args):
        with NoWaiting():
            measure(self, *args)

    monkeypatch.setattr(capture.Capture, "_measure", watched)
    monkeypatch.setattr(
        "rhythm_kernels.canonical._head_tables.like",
        lambda q, index: torch.zeros(len(index), 2, dtype=torch.int32, device=q.device),
    )
    with FakeTensorMode(), torch.no_grad():
        model = fake_model("mistral", "sdpa", device)
        batch, response = batch_of(layout, device)
        with RhythmProbe(model, GROUPS, response_mask=response) as probe:
            model(**batch, use_cache=False)
    assert probe.waad.shape == (2, 40)


@pytest.fixture
def fake_flash():
    """What the stand-in's operators return, for fake tensors."""
    with torch.library._scoped_library("flash_attn_standin", "FRAGMENT") as library:

        def fake(q, k, v, *rest):
            return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), q[:0], q[:0].clone()

        torch.library.register_fake("flash_attn_standin::_flash_attn_varlen_forward", fake, lib=library)
        yield


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("responses", [False, True])
def test_nothing_is_read_of_packed_sequences(responses, training, device, fake_flash):
    with FakeTensorMode():
        model = fake_model("mistral", "eager", device)
        ends = torch.tensor([0, 17, 40, 41, 60], dtype=torch.int32, device=device)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 23, "max_length_k": 23}
        ids = torch.randint(3, 97, (1, 60), device=device)
        response = torch.ones(1, 60, dtype=torch.bool, device=device) if responses else None
        with (
            flash_standin.installed(model),
            torch.set_grad_enabled(training and device == "cpu"),  # the stand-in has no backward
            RhythmProbe(model, GROUPS, response_mask=response) as probe,
        ):
            model(ids, position_ids=torch.arange(60, device=device)[None], **lengths, use_cache=False)
    assert set(probe.lse_source.values()) == {"flash-attn (varlen)"}
    assert probe.waad.shape == (1, 60)


def both_ways(monkeypatch, run):
    """What `run` gives where values are read at once, and where they are not."""
    want = run()
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        return want, run()


BATCHES = {
    "unpadded": lambda: {"input_ids": models.tokens(2, 72)},
    "all true": lambda: {"input_ids": models.tokens(2, 72), "attention_mask": torch.ones(2, 72, dtype=torch.long)},
    "padded": models.padded_batch,
    "packed": lambda: models.packed_batch()[0],
}


LAYOUTS = [
    ("unpadded", False),
    ("all true", True),
    ("padded", False),
    ("padded", True),
    ("packed", False),
    ("packed", True),
]


@pytest.mark.parametrize(
    ("implementation", "layout", "responses"),
    [
        *((implementation, *layout) for implementation in ("sdpa", "eager", "rhythm", "flash") for layout in LAYOUTS),
        ("flex_attention", "padded", True),  # its masks are made slowly
    ],
)
def test_the_numbers_are_the_same(implementation, responses, layout, monkeypatch):
    flash = implementation == "flash"  # the stand-in, installed in a model of another implementation
    model, batch = models.tiny_model("mistral", "eager" if flash else implementation), BATCHES[layout]()
    response = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(3)) > 0.7
    response = response if responses else None

    def run():
        standin = flash_standin.installed(model) if flash else contextlib.nullcontext()
        with torch.no_grad(), standin, RhythmProbe(model, GROUPS, response_mask=response) as probe:
            model(**batch, use_cache=False)
        return probe

    want, got = both_ways(monkeypatch, run)
    assert torch.equal(got.waad, want.waad)
    assert torch.equal(got.fai, want.fai)
    assert got.waad.any()
    assert got.lse_source == want.lse_source


@pytest.mark.parametrize(("layout", "responses"), LAYOUTS)
def test_the_numbers_of_chunks_are_the_same(responses, layout, monkeypatch):
    model, batch = models.tiny_model("llama4_text", **LLAMA4), BATCHES[layout]()
    response = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(3)) > 0.7

    def run():
        with torch.no_grad(), RhythmProbe(model, GROUPS, response_mask=response if responses else None) as probe:
            model(**batch, use_cache=False)
        return probe

    want, got = both_ways(monkeypatch, run)
    assert torch.equal(got.waad, want.waad)
    assert torch.equal(got.fai, want.fai)
    assert got.fai.any()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_calibration_is_the_same(layout, monkeypatch):
    model, batch = models.tiny_model("qwen3"), BATCHES[layout]()
    want, got = both_ways(monkeypatch, lambda: head_groups(model, [batch], layers="all", by="receiver"))
    assert got == want
    assert got.provenance == want.provenance


@pytest.mark.parametrize(
    "family", [*models.FAMILIES, "cohere2", "ministral", "starcoder2", "smollm3", "exaone4", "phimoe"]
)
def test_the_window_of_each_layer_is_known_by_name(family, monkeypatch):
    """Where masks may not be read, the window is taken from the layer; there it must be the one that the mask shows."""
    overrides = {"sliding_window": 9} if family in ("cohere2", "ministral", "starcoder2", "phimoe") else {}
    overrides |= {"head_dim": 16} if family == "ministral" else {}
    model = models.tiny_model(family, "eager", **overrides)
    batch = models.padded_batch()

    def run():
        found = []
        decide = layer_window.window_of_mask
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(layer_window, "window_of_mask", lambda *args: (found.append(decide(*args)), found[-1])[1])
            every = [(layer, 0) for layer in range(4)]
            with RhythmProbe(model, HeadGroups(every, every)) as probe:
                model(**batch, use_cache=False)
        assert probe.waad.isfinite().all()
        return found

    want, got = both_ways(monkeypatch, run)
    assert got == want
    assert len(got) == 4


@pytest.mark.parametrize(("family", "window"), [("phimoe", 9), ("llama", 9)])
def test_a_window_that_only_the_configuration_names_is_read_once(family, window, monkeypatch):
    """phimoe uses it, llama keeps and ignores it: the first forward that is longer reads the mask, the next do not."""
    model = models.tiny_model(family, "eager", sliding_window=window)
    forbid_reading(monkeypatch)
    read = []
    decide = layer_window.window_of_mask
    monkeypatch.setattr(
        layer_window, "window_of_mask", lambda *args: (read.append(not args[-1].sure), decide(*args))[1]
    )
    found = []
    for length in (window, 40, 40):
        batch = {"input_ids": models.tokens(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
        batch["attention_mask"][0, :3] = 0
        with torch.no_grad(), RhythmProbe(model, HeadGroups([(0, 0)], [(0, 0)])) as probe:
            model(**batch, use_cache=False)
        found.append(probe.waad)
    assert read == [False, True, False]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "rhythm"])
def test_packed_sequences_are_launched_by_their_longest(implementation, monkeypatch):
    """Not over as many tokens for each sequence as there are in all."""
    model, (batch, bounds) = models.tiny_model("qwen3", implementation), models.packed_batch()
    forbid_reading(monkeypatch)
    found = []
    measure = capture.Capture._measure

    def watched(self, *args):
        measure(self, *args)
        found.append(self._sequences.table.max_seqlen)

    monkeypatch.setattr(capture.Capture, "_measure", watched)
    with torch.no_grad(), RhythmProbe(model, HeadGroups([(0, 0)], [(0, 0)])) as probe:
        model(**batch, use_cache=False)
    assert found == [max(end - start for _, start, end in bounds)]
    assert probe.waad.isfinite().all()


def holes():
    batch = {"input_ids": models.tokens(2, 30), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    batch["attention_mask"][1, 7] = 0
    return "llama", batch, "masked tokens between live ones"


def unseen_packing():
    batch, _ = models.packed_batch()
    return "llama", {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}, "start again within one"


def block():
    return "llama", {"input_ids": models.tokens(2, 50)}, "not plain causal attention"


def sees_in_both_directions(monkeypatch):
    """Have Llama's masks let tokens 20 to 25 see each other, as those of an image do."""
    made = modeling_llama.create_causal_mask

    def inside(row, head, query, key):
        return (query >= 20) & (query < 26) & (key >= 20) & (key < 26)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", functools.partial(made, or_mask_function=inside))


@pytest.mark.parametrize("case", [holes, unseen_packing, block])
def test_what_is_not_measurable_is_nan_and_raises_later(case, monkeypatch):
    family, batch, message = case()
    model, fine = models.tiny_model(family), {"input_ids": models.tokens(1, 12)}
    if case is block:
        sees_in_both_directions(monkeypatch)
    forbid_reading(monkeypatch)

    def measured(probe):
        with torch.no_grad():
            model(**batch, use_cache=False)
        return [x.clone() for x in probe._results]

    with pytest.raises(ValueError, match=message), RhythmProbe(model, GROUPS) as probe:
        assert all(x.isnan().all() for x in measured(probe))
    # Before the next forward, and where results are read.
    with RhythmProbe(model, GROUPS) as probe:
        measured(probe)
        with pytest.raises(ValueError, match=message):
            model(**fine, use_cache=False)
        measured(probe)
        with pytest.raises(ValueError, match=message):
            probe.waad  # noqa: B018
        assert probe.waad.isnan().all()  # told once; the numbers stay what they are
        model(**fine, use_cache=False)
        assert probe.waad.isfinite().all()
    # An error on its way does not hide the one that the block is left with.
    probe = RhythmProbe(model, GROUPS).__enter__()
    measured(probe)
    probe.__exit__(ZeroDivisionError, ZeroDivisionError(), None)


def test_calibration_refuses_what_it_learns_later(monkeypatch):
    _, batch, message = holes()
    model = models.tiny_model("llama")
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match=message):
        head_groups(model, [batch])


class Slow:
    """In the place of a CUDA event: the answers arrive when the test says so."""

    arrived = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


def test_nothing_waits_for_answers_that_are_on_their_way(monkeypatch):
    _, batch, message = holes()
    model = models.tiny_model("llama")
    forbid_reading(monkeypatch)
    start = checks.Pending.__init__
    event = Slow()

    def slow(self, *args):
        start(self, *args)
        self._arrived = event

    monkeypatch.setattr(checks.Pending, "__init__", slow)
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(**batch, use_cache=False)
        assert probe.waad.isnan().all()
        model(**batch, use_cache=False)
        assert len(probe._capture._pending) == 2
    assert probe.fai.isnan().all()
    event.arrived = True
    with pytest.raises(ValueError, match=message):
        probe.fai  # noqa: B018
    probe._capture._pending.clear()


def test_one_table_a_forward(monkeypatch):
    """Every measured layer reads the table that the first one made."""
    model, batch = models.tiny_model("qwen3"), models.padded_batch()
    tables = []
    make = layer_call.canonical
    monkeypatch.setattr(layer_call, "canonical", lambda *args, **kw: (tables.append(kw["table"]), make(*args, **kw))[1])
    with torch.no_grad(), RhythmProbe(model, GROUPS):
        model(**batch, use_cache=False)
    assert len(tables) == 4
    assert len({id(table.seqs) for table in tables}) == 1


class Launches(TorchDispatchMode):
    """Count the operators that compute: each is at least one kernel on a GPU; views and allocations are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func._schema.name.rpartition("::")[2] in ("empty", "empty_like", "new_empty", "detach")
        self.count += not free
        return func(*args, **(kwargs or {}))


def test_a_measured_layer_adds_few_launches():
    """After the first layer of a forward, a layer costs its pass and the addition to the sums; no table is made."""
    model, batch = models.tiny_model("qwen3"), models.padded_batch()
    counts = []
    measure = capture.Capture._measure

    def counted(self, *args):
        with Launches() as launches:
            measure(self, *args)
        counts.append(launches.count)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(capture.Capture, "_measure", counted)
        patch.setattr(tensor_cache, "watched", lambda: False)  # else nothing is kept while this mode counts
        with RhythmProbe(model, GROUPS):
            model(**batch, use_cache=False)
    first, *later = counts
    assert len(later) == 3
    assert all(count <= 2 for count in later), counts
    assert first <= 45, counts


@contextlib.contextmanager
def cudnn_attention(asked):
    """Have scaled_dot_product_attention call cuDNN's operator as it does on sm_90, on fake CUDA tensors."""
    from torch.overrides import TorchFunctionMode

    class Routed(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.nn.functional.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            q, k, v = args
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            ask = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            causal, scale = kwargs["is_causal"], kwargs["scale"]
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, kwargs["attn_mask"], ask, 0.0, causal, False, scale=scale
            )[0]

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
                asked.append(args[lse._COMPUTE_LSE])
                if not args[lse._COMPUTE_LSE]:  # on a GPU there is no such output then; the fake kernel has one always
                    result = (result[0], None, *result[2:])
            return result

    with Asked(), Routed():
        yield


@pytest.mark.skipif(not CUDA, reason="this torch was built without CUDA, and cannot index fake CUDA tensors")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("raised", [True, False])
def test_cudnn_is_asked_for_its_log_sum_exp(raised, training, monkeypatch):
    monkeypatch.setattr(lse, "RAISE_CUDNN_FLAG", raised)
    asked = []
    with FakeTensorMode(), torch.set_grad_enabled(training):
        model = fake_model("qwen3", "sdpa", "cuda")
        batch, _ = batch_of("unpadded", "cuda")
        with cudnn_attention(asked), RhythmProbe(model, GROUPS) as probe:
            model(**batch, use_cache=False)
    seen = raised or training
    assert asked == [seen] * 4
    source = "sdpa: cuDNN attention" if seen else "streamed from q and k"
    assert probe.lse_source == dict.fromkeys(range(4), source)
