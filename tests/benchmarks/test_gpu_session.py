"""The one call that a GPU session is made of, rehearsed on the CPU: every step runs and leaves its status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rows import load

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["about", "build", "test", "quick", "sanitize", "bands", "streams", "probe", "report"]


def session(out: Path, *arguments: str) -> tuple[int, dict]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads((out / "session.json").read_text())


@pytest.mark.long
def test_rehearsal(tmp_path: Path) -> None:
    rc, found = session(tmp_path, "--rehearse")
    assert found["rehearsal"] is True
    assert list(dict.fromkeys(step["step"] for step in found["steps"])) == STEPS
    failed = [step for step in found["steps"] if step["rc"] != 0]
    assert not failed and rc == 0, (tmp_path / "session.log").read_text()[-3000:]
    rows = load([tmp_path / "rows.json"])
    assert {"credit", "band_rows", "band_columns", "row_stats", "column_stats", "attention", "probe"} <= {
        row.suite for row in rows
    }


def test_tuning_is_a_step_when_it_is_named(tmp_path: Path) -> None:
    rc, found = session(tmp_path, "--rehearse", "--steps", "tune")
    assert rc == 0 and [step["step"] for step in found["steps"]] == ["tune"]
    assert json.loads((tmp_path / "tiles.json").read_text())["architecture"] == "interpreter"


def test_a_step_that_fails_stops_nothing(tmp_path: Path) -> None:
    """`report` has no rows to read, `build` runs all the same, and the whole says that something failed."""
    rc, found = session(tmp_path, "--rehearse", "--steps", "build,report")
    assert rc == 1
    assert [(step["step"], step["rc"] == 0) for step in found["steps"]] == [("build", True), ("report", False)]


def test_no_step_outlasts_the_whole(tmp_path: Path) -> None:
    rc, found = session(tmp_path, "--rehearse", "--steps", "build,test", "--seconds", "1")
    assert rc == 1 and found["steps"] and all(step["rc"] is None for step in found["steps"])
