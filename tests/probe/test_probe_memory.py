"""Nothing of the probe has two sequence-length dimensions, and its memory grows with T, not T^2."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups
from rhythm_kernels.ops import dispatch
from rhythm_kernels.probe import capture, layer_call, layer_window

from . import probe_models as models

ROOT = Path(__file__).resolve().parents[2]
T = 1553  # prime, and no tile of any backend
GROUPS = HeadGroups(local=[(0, 0), (1, 1)], global_=[(0, 2), (1, 3)])


class EveryTensor(TorchDispatchMode):
    """Walk every tensor that any operator returns."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.count = 0
        self.quadratic: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count += 1
                both = list(leaf.shape).count(self.length) >= 2
                if both or leaf.untyped_storage().nbytes() >= self.length**2:
                    self.quadratic.append(f"{func} {tuple(leaf.shape)}")
        return result


@pytest.fixture(params=["backend of the machine", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("torch",)})


@pytest.fixture(params=["lse of the model", "streamed lse"])
def lse(request, monkeypatch):
    if request.param == "streamed lse":
        monkeypatch.setattr(layer_call, "as_batched", lambda *_: None)
    return request.param


def narrow_model(**overrides):
    return models.tiny_model("llama", num_hidden_layers=2, hidden_size=32, intermediate_size=32, **overrides)


@pytest.mark.parametrize("horizon", [(10, 50), (10, None)])
def test_whole_forward_of_an_unpadded_batch(backend, lse, horizon):
    model = narrow_model()
    with torch.no_grad(), EveryTensor(T) as every, RhythmProbe(model, GROUPS, horizon=horizon) as probe:
        model.model(models.tokens(1, T))
    assert every.quadratic == []
    assert every.count > 50
    assert probe.fai.any()
    source = "streamed from q and k" if lse == "streamed lse" else "sdpa: CPU flash attention"
    assert set(probe.lse_source.values()) == {source}


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_ours_in_padded_and_packed_batches(backend, packed, monkeypatch):
    """transformers itself makes (B, 1, T, T) masks for these, so only what the probe adds is walked."""
    every = EveryTensor(T)

    def walked(function):
        def call(*args, **kwargs):
            with every:
                return function(*args, **kwargs)

        return call

    for owner, name in (
        (capture, "sequences_of"),
        (layer_window, "window_of_mask"),
        (capture, "layer_call"),
        (RhythmProbe, "layer"),
    ):
        monkeypatch.setattr(owner, name, walked(getattr(owner, name)))
    batch = models.packed_batch((700, 53, 800))[0] if packed else models.padded_batch(T)
    model = narrow_model()
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model.model(**batch, use_cache=False)
    assert probe.waad.any()
    assert every.quadratic == []
    assert every.count > 50


@pytest.mark.parametrize("by", ["span", "receiver"])
def test_calibration(backend, by):
    with EveryTensor(T) as every:
        head_groups(narrow_model(), [{"input_ids": models.tokens(1, T)}], layers="all", by=by)
    assert every.quadratic == []


def test_peak_memory_is_linear_at_16k():
    """The process's own peak, in a process of its own: 16,384^2 bools alone would be 268 MB."""
    code = """
        import resource
        import torch
        from tests.probe import probe_models as models
        from rhythm_kernels import HeadGroups, RhythmProbe
        from rhythm_kernels.probe import layer_call
        torch.set_num_threads(1)
        small = dict(num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)
        model = models.tiny_model("llama", **small, hidden_size=32, intermediate_size=32)
        groups = HeadGroups(local=[(0, 0)], global_=[(1, 0)])
        def peak(length, probed):
            ids = models.tokens(1, length)
            with torch.no_grad():
                if probed:
                    with RhythmProbe(model, groups) as probe:
                        model.model(ids)
                    assert probe.waad.any()
                else:
                    model.model(ids)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak(1024, True)
        print(*(peak(length, probed) for length in (8192, 16384) for probed in (False, True)))
        layer_call.as_batched = lambda *_: None
        print(peak(16384, True))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    plain_8k, probed_8k, plain_16k, probed_16k, streamed_16k = (int(kib) / 1024 for kib in run.stdout.split())
    assert probed_8k - plain_8k < 32
    assert probed_16k - plain_16k < 32
    assert streamed_16k - plain_16k < 32
