"""Rows: their schema, files, table, plots and targets; the command; how calls are timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.__main__ import main
from benchmarks.contenders.chunked import Shrinking
from benchmarks.entries import Entry, default_path, load, save
from benchmarks.report import plots, seconds, size, table
from benchmarks.targets import TARGETS, Target, verdict, verdicts
from benchmarks.timing import Budget, contest, quantile

ABOUT = {
    "device": "Some CPU",
    "device_type": "cpu",
    "torch": "2.13.0",
    "triton": None,
    "python": "3.11",
    "cuda": None,
    "threads": 2,
    "commit": "0123456789ab-dirty",
}


def entry(rival: str, length: int, median: float | None, suite: str = "native_targets", **fields) -> Entry:
    shape = f"B1 T{length} H16/8 D64 float32"
    timing = {} if median is None else {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "cpu": median}
    return Entry(suite, rival, shape, "float32", {"length": length}, environment=ABOUT, **timing, **fields)


@pytest.fixture
def entries() -> list[Entry]:
    return [
        found
        for t in (4096, 8192)
        for found in (
            entry("waad: rhythm cpu", t, 3e-3 * t / 8192, peak_bytes=t * 4, gives=["waad"]),
            entry("SDPA forward", t, (t / 8192) ** 2, peak_bytes=t * 4096, gives=["out"]),
            entry("waad: eager maps", t, 0.45, peak_bytes=2**32, gives=["waad"])
            if t == 4096
            else entry("waad: eager maps", t, None, status="does not fit", reason="needs 24 GiB | 10 are free"),
        )
    ]


def test_files(tmp_path: Path, entries: list[Entry]) -> None:
    save(entries, tmp_path / "new" / "rows.json")
    assert load([tmp_path / "new" / "rows.json"]) == entries
    content = json.loads((tmp_path / "new" / "rows.json").read_text())
    content[0]["surprise"] = content[0].pop("median")
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"median.*surprise"):
        load([tmp_path / "bad.json"])
    assert default_path("NVIDIA H100 80GB HBM3").name.startswith("nvidia-h100-80gb-hbm3-")


def test_table(entries: list[Entry]) -> None:
    text = table(entries)
    assert "| B1 T8192 H16/8 D64 float32 | waad: rhythm cpu | waad | 3 ms | 2.7 ms to 3.6 ms |" in text
    assert r"does not fit: needs 24 GiB \| 10 are free" in text
    assert "0123456789ab-dirty" in text
    assert "0.30% of SDPA forward (at most 0.4%)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_units() -> None:
    assert [seconds(x) for x in (None, 2.0, 0.0123, 4.56e-6, 7e-10)] == ["", "2 s", "12.3 ms", "4.56 µs", "0.7 ns"]
    assert [size(x) for x in (None, 12, 2048, 3 * 2**30)] == ["", "12 B", "2 KiB", "3 GiB"]


def test_plots(tmp_path: Path, entries: list[Entry]) -> None:
    written = plots([*entries, entry("rhythm cpu", 64, 1e-4, suite="band_rows")], tmp_path)
    assert [path.name for path in written] == ["some-cpu-native_targets.png", "some-cpu-band_rows.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_targets(entries: list[Entry]) -> None:
    lines = verdicts(entries)
    assert len(lines) == 2
    assert lines[0].endswith("met") and "0.30%" in lines[0]
    assert lines[1].endswith("missed") and "300 times faster" in lines[1]
    slower = [replace(x, median=2 * x.median) for x in entries if x.rival == "SDPA forward" and x.median]
    assert verdicts([*entries, *slower]) == lines, "what was timed in another run is not compared with"
    band = Target("band_rows", "cuda", 8192, "rhythm triton", "", 0.8)
    fast = entry("rhythm triton", 8192, 1e-5, suite="band_rows", bandwidth_share=0.85)
    assert verdict(band, [fast]) is None
    fast.environment = {**ABOUT, "device_type": "cuda"}
    assert str(verdict(band, [fast])).endswith("met")
    assert str(verdict(band, [replace(fast, bandwidth_share=0.7)])).endswith("missed")
    two = replace(band, rival=("rhythm triton", "rhythm cuda"))
    faster = replace(fast, rival="rhythm cuda", median=0.9e-5, bandwidth_share=0.95)
    assert "rhythm cuda: 95.0%" in str(verdict(two, [fast, faster]))
    eager = replace(fast, rival="eager maps", median=1e-2, peak_bytes=2**32, bandwidth_share=None)
    less = Target("band_rows", "cuda", 8192, two.rival, "eager maps", 1 / 500, as_speedup=True, memory=True)
    assert verdict(less, [fast, eager]) is None, "nothing without a peak"
    small = replace(fast, peak_bytes=2**20)
    assert "4096 times less memory than eager maps (at least 500): met" in str(verdict(less, [small, eager]))
    wide = replace(band, layout=(("dim", 128),))
    assert verdict(wide, [fast]) is None
    assert verdict(wide, [replace(fast, dimensions={"length": 8192, "dim": 128})])
    assert all(target.bound > 0 for target in TARGETS)


def test_cpu_time_counts_where_the_clock_is_too_noisy() -> None:
    probe = Target("probe", "cpu", 4096, "forward + probe", "forward alone", 1.03, by_cpu_time=True)
    alone = entry("forward alone", 4096, 1.0, suite="probe")
    for clock, cpu, word in ((1.02, 1.5, "met"), (1.5, 1.02, "met"), (1.5, 1.04, "missed")):
        found = replace(entry("forward + probe", 4096, clock, suite="probe"), cpu=cpu)
        assert str(verdict(probe, [alone, found])).endswith(word)
    assert str(verdict(replace(probe, by_cpu_time=False), [alone, replace(found, cpu=1.0)])).endswith("missed")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    for _ in range(2):  # a second run adds to the file
        assert main(["--suite", "credit", "--profile", "tiny", "--device", "cpu", "--save", str(path)]) == 0
    found = load([path])
    assert len(found) == 10
    content = json.loads(path.read_text())[0]
    assert content["environment"]["torch"] == torch.__version__
    for name in ("device", "cpu", "threads", "python", "triton", "cuda", "commit"):
        assert name in content["environment"]
    assert {"median", "p20", "p80", "cpu", "samples", "peak_bytes", "ratio", "bytes", "flops", "time"} <= set(content)
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    assert "token loop" in capsys.readouterr().out


def test_a_report_in_a_folder(tmp_path: Path, entries: list[Entry]) -> None:
    save(entries, tmp_path / "rows.json")
    assert main(["report", str(tmp_path / "rows.json"), "--out", str(tmp_path / "report")]) == 0
    assert "![some-cpu-native_targets](some-cpu-native_targets.png)" in (tmp_path / "report/report.md").read_text()


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = contest(calls, torch.device("cpu"), Budget(0.0, least=4, most=9))
    assert sorted(order[:3]) == ["a", "b", "c"]  # one of each in the first round
    for name in "abc":
        assert len(samples[name].wall) == len(samples[name].cpu) == order.count(name) >= 4


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    assert quantile([5.0], 0.8) == 5


def test_a_block_shrinks_until_it_fits() -> None:
    tried: list[int] = []

    def run(block: int) -> dict[str, torch.Tensor]:
        tried.append(block)
        if block > 3:
            raise torch.OutOfMemoryError("no memory")
        return {}

    call = Shrinking(run, 16)
    assert call() == {} and tried == [16, 8, 4, 2]
    assert call() == {} and tried[-1] == 2, "what did not fit once is not tried again"
    with pytest.raises(RuntimeError, match="something else"):
        Shrinking(lambda block: (_ for _ in ()).throw(RuntimeError("something else")), 16)()


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_peak_memory_counts_what_is_freed_again() -> None:
    def call() -> None:
        torch.ones(16 * 2**20)

    found, by = memory.peak(call, torch.device("cpu"))
    assert by == "resident high-water mark"
    assert found is not None and 60 * 2**20 < found < 80 * 2**20


def test_pytest_benchmark_runs_the_suites(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--bench-profile", "tiny", "-k", "credit-B4", "-q"]
    path = tmp_path / "benchmark.json"
    # Without what xdist leaves to its workers: pytest-benchmark measures nothing in one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, "-p", "no:xdist", "-p", "no:cacheprovider", f"--benchmark-json={path}"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(path.read_text())["benchmarks"]
    assert len(found) == 5
    assert all(entry["stats"]["rounds"] >= 1 and entry["extra_info"]["bytes"] for entry in found)
