"""Which backend a pass takes by default, and that one line of data changes it."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels.ops import dispatch

PASSES = ("band_rows", "band_columns", "row_stats", "column_stats", "attention", "credit")


def chosen(device: str) -> dict[str, str]:
    """Pass -> its default on a device where every backend that serves it is usable."""
    return {name: dispatch.choose.__wrapped__(name, None, torch.device(device)) for name in PASSES}


@pytest.fixture(autouse=True)
def _all_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_unusable", lambda name, device: "")


def test_defaults() -> None:
    streams = ("row_stats", "column_stats", "attention")
    assert chosen("cuda") == {"credit": "cuda"} | dict.fromkeys(("band_rows", "band_columns", *streams), "triton")
    assert set(chosen("cpu").values()) == {"cpu"}
    assert set(chosen("meta").values()) == {"torch"}


@pytest.mark.parametrize(("name", "winner"), [("band_rows", "cuda"), ("band_columns", "cuda"), ("credit", "torch")])
def test_one_line_changes_one_pass(name: str, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {device: chosen(device) for device in ("cuda", "cpu")}
    assert before["cuda"][name] != winner
    monkeypatch.setitem(dispatch._PREFERS, ("cuda", name), (winner, "triton"))
    assert chosen("cuda") == before["cuda"] | {name: winner}
    assert chosen("cpu") == before["cpu"]


def test_what_a_pass_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._PREFERS, ("cuda", "row_stats"), ("cuda", "torch"))
    assert chosen("cuda")["row_stats"] == "torch"
    monkeypatch.setattr(dispatch, "_unusable", lambda name, device: "absent" if name == "triton" else "")
    assert chosen("cuda")["band_rows"] == "cuda"
