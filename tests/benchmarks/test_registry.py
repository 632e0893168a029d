"""Every entry of the registry runs on a tiny shape and passes its gate; every shape has its work counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rivals import RIVALS
from benchmarks.runner import compete
from benchmarks.shapes import DEVICES, PROFILES, SHAPES, every_shape, shapes
from benchmarks.suites import SUITES
from benchmarks.timing import BUDGETS

CPU = torch.device("cpu")
NEED_A_COMPILER = ("read loop", "multiply-add loop")


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("suite", SUITES)
def test_every_rival_passes_its_gate(suite: str) -> None:
    entries, samples = compete(suite, shapes(suite, "cpu", "tiny")[0], CPU, BUDGETS["tiny"])
    assert [entry.rival for entry in entries] == [rival.name for rival in RIVALS[suite] if "cpu" in rival.devices]
    for entry in entries:
        assert entry.status in ("ok", "unavailable"), f"{entry.rival}: {entry.reason}"
        if entry.status == "unavailable":
            assert "rhythm" in entry.rival or entry.rival in NEED_A_COMPILER or suite == "countdown_step"
            assert entry.reason
            continue
        assert entry.samples == len(samples[entry.rival].wall) > 0
        assert entry.error is not None and entry.error <= 1
        assert entry.median is not None and entry.p20 is not None and entry.p80 is not None
        assert entry.p20 <= entry.median <= entry.p80
        assert entry.ratio is not None and entry.yardstick == SUITES[suite].yardstick["cpu"]
    yardstick = next(entry for entry in entries if entry.rival == SUITES[suite].yardstick["cpu"])
    if yardstick.status == "ok":
        assert yardstick.ratio == 1
    else:
        assert {entry.status for entry in entries} == {"unavailable"}, "a yardstick is missing without need"
    for kind in {rival.ceiling for rival in RIVALS[suite] if "cpu" in rival.devices} - {""}:
        shares = [getattr(entry, {"bytes": "bandwidth_share", "flops": "flops_share"}[kind]) for entry in entries]
        tops = {rival.name for rival in RIVALS[suite] if rival.ceiling == kind}
        assert max(share for entry, share in zip(entries, shares) if entry.rival in tops and share) == pytest.approx(1)


@pytest.mark.parametrize("suite", SUITES)
def test_the_registry_is_complete(suite: str) -> None:
    names = [rival.name for rival in RIVALS[suite]]
    assert len(set(names)) == len(names)
    assert set(SHAPES[suite]) == {(device, profile) for device in DEVICES for profile in PROFILES[1:]}
    for device in DEVICES:
        assert SUITES[suite].yardstick[device] in names
    for shape in every_shape(suite):
        assert SUITES[suite].work(shape).bytes > 0
        for rival in RIVALS[suite]:
            for device in rival.devices:
                assert rival.memory is None or rival.memory(shape, device) >= 0
                assert rival.work is None or rival.work(shape, device).bytes + rival.work(shape, device).flops > 0


def test_ours_has_no_slack() -> None:
    ours = [rival for rivals in RIVALS.values() for rival in rivals if "rhythm" in rival.name]
    assert ours and not any(rival.slack for rival in ours)
