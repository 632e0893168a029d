"""Running a suite: which rivals and shapes, deadlines, and going on behind a rival that broke the CUDA context."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import runner
from benchmarks.entries import Entry, load
from benchmarks.rivals import RIVALS
from benchmarks.runner import BrokenDeviceError, Choice, run_suite
from benchmarks.timing import BUDGETS, Budget, contest

CPU = torch.device("cpu")
TINY = BUDGETS["tiny"]
EVERYTHING = Choice()


def credit(choice: Choice = EVERYTHING, budget: Budget = TINY, earlier: tuple[Entry, ...] = ()) -> list[list[Entry]]:
    return list(run_suite("credit", "tiny", CPU, budget, choice, earlier))


def test_a_choice_of_rivals() -> None:
    among, without = Choice(among=("token loop", "rhythm torch")), Choice(without=("token loop",))
    assert [entry.rival for entry in credit(among)[0]] == ["rhythm torch", "token loop"]
    assert "token loop" not in {entry.rival for entry in credit(without)[0]}
    assert credit(Choice(lengths=(1,))) == []


def test_nothing_is_begun_after_the_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    assert credit(budget=replace(TINY, deadline=time.monotonic() - 1)) == []
    assert "not begun" in capsys.readouterr().out


def test_rounds_end_at_the_deadline() -> None:
    """But the first round, without which there would be no sample."""
    samples = contest({"a": lambda: None}, CPU, Budget(60.0, least=9, deadline=time.monotonic() - 1))
    rounds_of_one = contest({"a": lambda: None}, CPU, Budget(0.0, 1, 1))
    assert len(samples["a"].wall) == len(rounds_of_one["a"].wall)


def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the vectorised rule raise, and the device be broken afterwards."""

    def fail(problem: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    rivals = tuple(replace(x, make=fail) if x.name == "rhythm torch" else x for x in RIVALS["credit"])
    monkeypatch.setitem(runner.RIVALS, "credit", rivals)
    monkeypatch.setattr(runner, "broken", lambda device: True)
    monkeypatch.setattr(command, "broken", lambda device: True)


def test_a_broken_context_ends_the_process_and_the_next_leaves_its_rival_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    breaking(monkeypatch)
    with pytest.raises(BrokenDeviceError, match=r"rhythm torch.*illegal memory access"):
        credit()
    path = tmp_path / "rows.json"
    given = ["--suite", "credit", "--profile", "tiny", "--device", "cpu", "--save", str(path), "--resume"]
    assert command.main(given) == command.BROKEN
    assert [(entry.rival, entry.status) for entry in load([path])] == [("rhythm torch", "failed")]
    assert command.main(given) == 0
    entries = {entry.rival: entry for entry in load([path])}
    assert entries["rhythm torch"].status == "failed" and entries["token loop"].status == "ok"
    before = len(load([path]))
    assert command.main(given) == 0 and len(load([path])) == before, "what was measured is not measured again"


def test_what_others_measured_does_not_stand_for_a_rival(tmp_path: Path) -> None:
    """A later choice of rivals at the same shape is run, and whole: its entries are compared with each other."""
    path = tmp_path / "rows.json"
    given = ["--suite", "credit", "--profile", "tiny", "--device", "cpu", "--save", str(path), "--resume", "--among"]
    for among in (["rhythm torch"], ["rhythm torch", "--among", "token loop"]):
        assert command.main([*given, *among]) == 0
    assert [entry.rival for entry in load([path])] == ["rhythm torch", "rhythm torch", "token loop"]


def test_a_failure_that_breaks_nothing_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch)
    monkeypatch.setattr(runner, "broken", lambda device: False)
    entries = {entry.rival: entry.status for entry in credit()[0]}
    assert entries["rhythm torch"] == "failed" and entries["token loop"] == "ok"
