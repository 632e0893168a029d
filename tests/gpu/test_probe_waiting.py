"""On a GPU: a measured layer makes the host wait for nothing, and what its checks find arrives all the same."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rhythm_kernels import RhythmProbe
from rhythm_kernels.probe.capture import Capture

from .test_lse_source import GROUPS, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def no_synchronisation(device):
    """torch raises where the host would wait for the device; on a CPU there is nothing to raise."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch_of(length, padded, device):
    batch = {"input_ids": torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1)).to(device)}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :37] = 0
    return batch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_measured_layer_synchronises_nothing(device, training, padded, monkeypatch):
    model = small_model(device, 2).train(training)
    layers = []
    strict = []  # head tables are copied and kernels compiled in a first forward
    for name in ("_measure", "_after"):
        method = getattr(Capture, name)

        def watched(self, *args, method=method, name=name):
            with no_synchronisation(device) if strict else contextlib.nullcontext():
                layers.append(name)
                return method(self, *args)

        monkeypatch.setattr(Capture, name, watched)
    with torch.set_grad_enabled(training), RhythmProbe(model, GROUPS) as probe:
        model(**batch_of(200, padded, device), use_cache=False)
        strict.append(True)
        for length in (230, 260):
            response = torch.ones(2, length, dtype=torch.bool, device=device)
            response[:, :40] = False
            probe.response_mask = response if padded else None
            model(**batch_of(length, padded, device), use_cache=False)
    assert layers == ["_measure", "_measure", "_after"] * 3
    assert probe.waad.isfinite().all() and probe.waad.any()


@pytest.mark.gpu
def test_a_mask_with_a_hole_gives_nan_and_an_error():
    model, batch = small_model("cuda", 2), batch_of(100, True, "cuda")
    batch["attention_mask"][1, 50] = 0
    probe = RhythmProbe(model, GROUPS).__enter__()
    with torch.no_grad():
        model(**batch, use_cache=False)
    assert probe._results[0].isnan().all() and probe._results[1].isnan().all()
    with pytest.raises(ValueError, match="masked tokens between live ones"):
        probe._capture.examine(wait=True)
    probe.__exit__(None, None, None)
