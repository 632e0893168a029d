"""The two calls that need a GPU: their steps within limits, and both rehearsed whole on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import BROKEN
from benchmarks.entries import load
from benchmarks.gpu import carry
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.plan import GPU_TESTS, SECONDS, Plan
from benchmarks.gpu.steps import NOT_FOUND, OUT_OF_TIME, ROOT, Call, Step
from benchmarks.rivals import RIVALS
from benchmarks.shapes import SHAPES


def python(name: str, code: str, limit: float = 30, **more) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **more)


def test_no_step_stops_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = Call("right", tmp_path, 60, {"device": "some"})
    call.run(python("bad", "print('a reason'); raise SystemExit(3)"))
    call.run(python("good", "import os; print(os.environ['GIVEN'])", shown=5, environment={"GIVEN": "a value"}))
    call.run(Step("missing", [str(tmp_path / "no such program")], 30))
    assert call.failed
    found = json.loads((tmp_path / "right.json").read_text())
    assert found["device"] == "some" and found["call"] == "right"
    assert [(step["step"], step["status"]) for step in found["steps"]] == [
        ("bad", 3),
        ("good", 0),
        ("missing", NOT_FOUND),
    ]
    shown = capsys.readouterr().out
    assert "no such program" in shown and "a reason" in shown and "a value" in shown and "exit status 3" in shown
    log = (tmp_path / "right.log").read_text()
    assert log.index("a reason") < log.index("===== good") < log.index("a value")


def test_a_limit_ends_a_step_and_its_children(tmp_path: Path) -> None:
    """What the step started ends with it, also where it does not listen."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    call = Call("right", tmp_path, 60, {})
    outcome = call.run(python("slow", code, limit=12))
    assert outcome.status == OUT_OF_TIME and outcome.seconds < 20
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/status")
    for _ in range(50):  # a killed process takes a moment
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(status.read_text())


def test_what_is_written_before_the_limit_stays(tmp_path: Path) -> None:
    """The first signal is the one at which Python still runs what must be run."""
    code = f"import time\ntry: time.sleep(60)\nfinally: open({str(tmp_path / 'kept')!r}, 'w').write('rows')"
    Call("right", tmp_path, 60, {}).run(python("slow", code, limit=18))  # the signal comes 10 s before that
    assert (tmp_path / "kept").read_text() == "rows"


def test_nothing_is_begun_without_time(tmp_path: Path) -> None:
    call = Call("fast", tmp_path, 2, {})
    assert call.run(python("late", f"open({str(tmp_path / 'begun')!r}, 'w')")).status is None
    assert call.failed and not (tmp_path / "begun").exists()


def test_a_step_is_told_what_is_left(tmp_path: Path) -> None:
    call = Call("fast", tmp_path, 40, {})
    call.run(Step("asks", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{left}"], 20, shown=1))
    assert "\n15\n" in (tmp_path / "fast.log").read_text()


def test_a_broken_context_is_gone_on_behind(tmp_path: Path) -> None:
    """The step is started again while it reports one, but not for ever."""
    counter = tmp_path / "count"
    code = (
        f"from pathlib import Path; p = Path({str(counter)!r})\n"
        "n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1))\n"
        f"raise SystemExit({BROKEN} if n < LIMIT else 0)"
    )
    call = Call("right", tmp_path, 60, {})
    outcome = call.run(python("breaks", code.replace("LIMIT", "2")))
    assert outcome.status == 0 and outcome.restarts == 2
    counter.unlink()
    outcome = call.run(python("breaks always", code.replace("LIMIT", "99")))
    assert outcome.status == BROKEN and outcome.restarts == 3


def test_the_plans_name_what_exists() -> None:
    for name in SECONDS:
        steps = Plan(name, Path("out")).steps()
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            command = list(step.command)
            suites = [command[i + 1] for i, part in enumerate(command) if part == "--suite"]
            lengths = {int(command[i + 1]) for i, part in enumerate(command) if part == "--length"}
            among = {command[i + 1] for i, part in enumerate(command) if part == "--among"}
            for suite in suites:
                assert among <= {rival.name for s in suites for rival in RIVALS[s]}
                assert lengths <= {shape.length for shape in SHAPES[suite]["cuda", "full"]}


def test_every_gpu_test_is_where_the_calls_look() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert found and not [name for name in found if not name.startswith(GPU_TESTS)]
    assert all(any(name.startswith(where) for name in found) for where in GPU_TESTS)


def test_what_is_said_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["right"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["right", "--rehearse", "--only", "nothing"])
    assert "must be among first, tests" in capsys.readouterr().err


def test_what_was_carried_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit's name and compiled kernels reach the processes that follow; without a folder nothing changes."""
    import tarfile

    monkeypatch.setenv("PYTHONPATH", "given")
    for name in ("RHYTHM_COMMIT", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "before")
    folder = tmp_path / "carry"
    for name, path in (("FOLDER", ""), ("_WHEELS", "wheels"), ("_COMMIT", "commit"), ("_CACHE", "cache.tar.xz")):
        monkeypatch.setattr(carry, name, folder / path)
    monkeypatch.setattr(carry, "_UNPACKED", tmp_path / "unpacked")
    import os

    carry.unpack()
    assert os.environ["RHYTHM_COMMIT"] == os.environ["TRITON_CACHE_DIR"] == "before"
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "kernel.cubin").write_bytes(b"code")
    folder.mkdir()
    (folder / "commit").write_text("0123456789ab\n")
    with tarfile.open(folder / "cache.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "triton", arcname="triton")
    carry.unpack()
    assert os.environ["RHYTHM_COMMIT"] == "0123456789ab"
    assert (Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin").read_bytes() == b"code"


@pytest.mark.long
@pytest.mark.parametrize("name", SECONDS)
def test_rehearsal(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rehearsal"] is True
    assert [(step["step"], step["status"]) for step in found["steps"]] == [
        (step.name, 0) for step in Plan(name, tmp_path).steps()
    ]
    suites = {entry.suite for entry in load([tmp_path / f"{name}-rows.json"])}
    wanted = {"right": {"band_rows", "band_columns"}, "fast": {"attention", "row_stats", "column_stats", "probe"}}
    assert wanted[name] <= suites
