"""The tuner of launch choices: what it tries, what it refuses, what it writes, and when that is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import rhythm_kernels.backend.triton as passes
from rhythm_kernels.backend.triton import choosing, configs, tile_file
from rhythm_kernels.backend.triton.configs import TILES, Tile
from rhythm_kernels.tuning import shortlist, trial, tune

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARCH = choosing.architecture(DEVICE)
SIZE = 16
TINY = ["--length", "40", "--head-size", str(SIZE), "--dtype", "fp32", "--heads", "2", "--kv-heads", "1"]
WORKLOAD = trial.Workload(40, 2, 1, SIZE, "fp32")
TABLE = {name: configs.listed(name, ARCH, 32, SIZE) for name in trial.RUNS}
FAVOURITE = {name: tune.candidates(tile, 2)[1] for name, tile in TABLE.items()}


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No file is asked for, the cache is the test's own, and nothing that was read outlives the test."""
    monkeypatch.delenv("RHYTHM_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choosing._asked_for.cache_clear()
    yield
    choosing._asked_for.cache_clear()


@pytest.fixture
def favourites(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second neighbour of every kernel takes half of the table's time."""
    monkeypatch.setattr(trial.Trial, "milliseconds", lambda self, tile: 1.0 if tile == FAVOURITE[self.kernel] else 2.0)


def main(path: Path, *more: str, **kwargs: Any) -> dict[str, Any]:
    assert tune.main([*TINY, "--candidates", "2", "--save", str(path), *more], **kwargs) == 0
    return json.loads(path.read_text())


def tiles(content: dict[str, Any]) -> dict[str, Tile]:
    return {entry["kernel"]: Tile(**entry["tile"]) for entry in content["tiles"]}


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, dict[str, Any]], Any]) -> None:
    """band_rows with its favourite tile gives what `change` makes of its result."""
    honest = passes.band_rows

    def band_rows(q: Any, k: Any, lse: Any, rule: Any, window: Any, per_head: Any) -> torch.Tensor:
        found = honest(q, k, lse, rule, window, per_head)
        chosen = choosing.choose("band_rows", ARCH, 32, SIZE)
        return change(found, {"softcap": rule.softcap}) if chosen == FAVOURITE["band_rows"] else found

    monkeypatch.setattr(passes, "band_rows", band_rows)


@pytest.mark.parametrize("interpreted", [False, True])
def test_candidates_are_neighbours_within_bounds(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "INTERPRETED", interpreted)
    for tile in {tile for arch in TILES.values() for entries in arch.values() for tile in entries.values()}:
        found = tune.candidates(tile, 24)
        assert 0 < len(found) <= 24 and len(set(found)) == len(found) and tile not in found
        assert tune.candidates(tile, 3) == found[:3]
        for x in found:
            assert x.rows in (tile.rows // 2, tile.rows, 2 * tile.rows) and 16 <= x.rows <= 256
            assert x.keys in (tile.keys // 2, tile.keys, 2 * tile.keys) and 16 <= x.keys <= 256
            assert x.warps in (4, 8, tile.warps) and x.registers * x.warps * 32 <= 65536
            assert (x.warps, x.stages) == (tile.warps, tile.stages) or not interpreted
        first = found[0]
        assert sum(a != b for a, b in zip(first[:4], tile[:4])) == 1


def test_candidates_include_caps_on_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An uncapped kernel is also tried with as few registers as let another block run on an SM of 65536."""
    monkeypatch.setattr(tune, "INTERPRETED", False)
    four, eight = Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)
    assert {x.registers for x in tune.candidates(four, 24) if x[:4] == four[:4]} == {128, 168, 255}
    assert {x.registers for x in tune.candidates(eight, 24) if x[:4] == eight[:4]} == {128, 255}
    capped = four._replace(registers=128)
    assert {x.registers for x in tune.candidates(capped, 24) if x[:4] == four[:4]} == {168, 255}


def test_every_kernel_has_a_run() -> None:
    for arch, kernels in TILES.items():
        assert kernels.keys() == trial.RUNS.keys(), arch


def test_from_tuning_to_choosing(favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel's winner is written with where it comes from; read only when asked for; serves its own key only."""
    content = main(tmp_path / "new" / "tiles.json")
    assert tiles(content) == FAVOURITE
    assert content["architecture"] == ARCH and content["triton"] == triton.__version__
    assert content["device"] == tile_file.device_name() and content["capability"] == tile_file.capability()
    measured = content["tiles"][0]["measured"]
    assert measured.keys() == {
        "length", "heads", "kv_heads", "head_size", "dtype", "ms", "table_ms", "package", "torch", "date"
    }  # fmt: skip
    assert (measured["ms"], measured["table_ms"], measured["length"]) == (1.0, 2.0, 40)

    def chosen(size: int = SIZE, bits: int = 32) -> dict[str, Tile]:
        return {name: choosing.choose(name, ARCH, bits, size) for name in trial.RUNS}

    assert chosen() == TABLE  # a file is there, and nobody asked
    given = trial.arguments(WORKLOAD, DEVICE, full_rule=True)
    want = {name: trial.outputs(name, given) for name in trial.RUNS}
    monkeypatch.setenv("RHYTHM_TILES", str(tmp_path / "new" / "tiles.json"))
    assert chosen() == TABLE  # looked up once
    choosing._asked_for.cache_clear()
    assert chosen() == FAVOURITE
    assert chosen(SIZE + 1) == {name: configs.listed(name, ARCH, 32, SIZE + 1) for name in trial.RUNS}
    for name in trial.RUNS:
        for kind, x, y in zip(trial.RUNS[name][2], trial.outputs(name, given), want[name]):
            assert ((x - y).abs() <= trial.limit(kind, y, 0.0)).all(), (name, kind)
    (tmp_path / "new" / "tiles.json").unlink()
    assert chosen() == FAVOURITE  # read once


def test_the_cache_is_where_one_looks(favourites: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert tune.main([*TINY, "--candidates", "2", "--kernel", "band_rows"]) == 0
    assert "RHYTHM_TILES=1 uses it" in capsys.readouterr().out
    assert tile_file.cache_path().name.endswith(f"triton{triton.__version__}.json")
    monkeypatch.setenv("RHYTHM_TILES", "1")
    assert choosing.choose("band_rows", ARCH, 32, SIZE) == FAVOURITE["band_rows"]


def test_what_is_asked_for_does_not_change_what_is_tuned_against(
    favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is still to be made may be asked for already."""
    monkeypatch.setenv("RHYTHM_TILES", str(tmp_path / "tiles.json"))
    assert tiles(main(tmp_path / "tiles.json", "--kernel", "band_rows")) == {"band_rows": FAVOURITE["band_rows"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, rule: x + 1e-3, "wrong: waad"),
        (lambda x, rule: x * float("nan"), "wrong: waad"),
        (lambda x, rule: x + (1e-3 if rule["softcap"] else 0), "with the full rule wrong: waad"),
    ],
)  # fmt: skip
def test_a_wrong_tile_is_refused(
    change: Any, reason: str, favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    corrupt(monkeypatch, change)
    assert main(tmp_path / "tiles.json", "--kernel", "band_rows")["tiles"] == []
    out = capsys.readouterr().out
    assert reason in out and "the table's stays" in out
    assert ("1 timed, 1 wrong" in out) == (not reason.startswith("with"))


def test_a_tile_that_does_not_run_is_refused(
    favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def change(found: torch.Tensor, rule: Any) -> None:
        raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")

    corrupt(monkeypatch, change)
    assert main(tmp_path / "tiles.json", "--kernel", "band_rows")["tiles"] == []
    out = capsys.readouterr().out
    assert "does not run: out of resource: shared memory" in out and "1 timed, 1 does not run" in out


@pytest.mark.parametrize(("words", "kept"), [(4, False), (3, True)])
def test_a_tile_that_spills_more_than_the_tables_is_refused(
    words: int, kept: bool, favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In what Triton keeps of a kernel that was launched, the number of spilled words is looked up."""
    cache: dict[int, Any] = {}
    module = sys.modules["rhythm_kernels.backend.triton.band_rows"]
    monkeypatch.setattr(module, "stand_in", SimpleNamespace(device_caches=cache), raising=False)
    honest = trial.outputs

    def outputs(kernel: str, given: Any) -> Any:
        assert kernel != "band_rows" or not cache  # nothing from an earlier launch
        spilled = words if choosing.choose("band_rows", ARCH, 32, SIZE) == FAVOURITE["band_rows"] else 3
        cache[0] = ({"key": SimpleNamespace(n_spills=spilled)}, {})
        return honest(kernel, given)

    monkeypatch.setattr(trial, "outputs", outputs)
    assert bool(main(tmp_path / "tiles.json", "--kernel", "band_rows")["tiles"]) is kept
    assert ("spills: 4 words, the table's 3" in capsys.readouterr().out) is not kept


def test_a_lucky_time_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the table's time at first, as long as it when measured again: the table stays, and an old entry goes."""
    monkeypatch.setattr(trial.Trial, "milliseconds", lambda self, tile: 1.0 if tile == FAVOURITE[self.kernel] else 2.0)
    main(tmp_path / "tiles.json", "--kernel", "band_rows", "--kernel", "row_stats")
    seen: list[Tile] = []

    def milliseconds(self: trial.Trial, tile: Tile) -> float:
        seen.append(tile)
        return 1.0 if tile == FAVOURITE[self.kernel] and seen.count(tile) == 1 else 2.0

    monkeypatch.setattr(trial.Trial, "milliseconds", milliseconds)
    content = main(tmp_path / "tiles.json", "--kernel", "band_rows")
    assert seen.count(FAVOURITE["band_rows"]) == 2
    assert tiles(content) == {"row_stats": FAVOURITE["row_stats"]}  # not tuned again: kept


def test_the_budget_is_kept(favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A clock on which every run takes four seconds: no candidate begins late, what is left out is told."""
    now = 0.0
    honest = trial.outputs

    def outputs(kernel: str, given: Any) -> Any:
        nonlocal now
        now += 4.0
        return honest(kernel, given)

    monkeypatch.setattr(trial, "outputs", outputs)
    kernels = ["--kernel", "band_rows", "--kernel", "band_columns", "--kernel", "row_stats"]
    content = main(tmp_path / "tiles.json", *kernels, "--seconds", "16", clock=lambda: now)
    out = capsys.readouterr().out
    # The table's tile takes 8 seconds with its arguments: more than a third of 16, and half of them twice.
    assert "2 not reached" in out and "Out of time before row_stats" in out
    assert content["tiles"] == [] and now == 16


def good() -> dict[str, Any]:
    tile = FAVOURITE["band_rows"]._asdict()
    return {
        "architecture": ARCH, "capability": tile_file.capability(), "triton": triton.__version__,
        "tiles": [{"kernel": "band_rows", "bits": 32, "head_size": SIZE, "tile": tile}],
    }  # fmt: skip


def edited(**tile: Any) -> dict[str, Any]:
    content = good()
    content["tiles"][0]["tile"] |= tile
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks architecture, capability, triton, tiles"),
        ({**good(), "tiles": 3}, "lacks a list of tiles"),
        ({**good(), "architecture": "sm_70"}, "was tuned for architecture sm_70, this is"),
        ({**good(), "capability": "7.0"}, "was tuned for capability 7.0, this is"),
        ({**good(), "triton": "2.0.0"}, "was tuned for triton 2.0.0, this is"),
        ({**good(), "tiles": [3]}, "an entry must have the fields kernel, bits, head_size and tile"),
        ({**good(), "tiles": [{**good()["tiles"][0], "kernel": ["x"]}]}, "kernel must be a name"),
        ({**good(), "tiles": [{**good()["tiles"][0], "kernel": "rows"}]}, "kernel must be one of band_rows, "),
        (
            {**good(), "tiles": [{**good()["tiles"][0], "bits": "32"}]},
            "must be an integer of 0 or more, got '32'",
        ),
        (edited(columns=3), "a tile must have the fields rows, keys, warps"),
        (edited(rows=True), "rows of band_rows must be an integer of 0 or more, got True"),
        (edited(rows=24), "rows of band_rows must be a power of two from 16 to 1024, got 24"),
        (edited(keys=8), "keys of band_rows must be a power of two from 16 to 1024, got 8"),
        (edited(warps=64), "warps of band_rows must be a power of two from 1 to 32, got 64"),
        (edited(stages=0), "stages of band_rows must be from 1 to 16, got 0"),
        (edited(capped_rows=3), "capped_rows of band_rows must be a power of two from 16 to 1024, got 3"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And none to add to."""
    path = tmp_path / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("RHYTHM_TILES", str(path))
    with pytest.raises(ValueError, match=r"tiles\.json") as raised:
        choosing.choose("band_rows", ARCH, 32, SIZE)
    assert message in str(raised.value)
    with pytest.raises(SystemExit) as exit_:
        tune.main([*TINY, "--save", str(path)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text(json.dumps(good()))
    assert tile_file.load(tmp_path / "tiles.json", ARCH, TILES[ARCH]) == {
        ("band_rows", 32, SIZE): FAVOURITE["band_rows"]
    }


def test_a_missing_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_TILES", "1")
    with pytest.raises(FileNotFoundError, match=r"python -m rhythm_kernels\.tuning"):
        choosing.choose("band_rows", ARCH, 32, SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--heads", "1"], "--heads must be a multiple of --kv-heads 8, at least 2, got 1"),
        (["--heads", "3", "--kv-heads", "2"], "--heads must be a multiple of --kv-heads 2, at least 2, got 3"),
        (["--head-size", "300"], "--head-size must be from 1 to 256, got 300"),
        (["--length", "3"], "--length must be at least 16, got 3"),
        (["--candidates", "0"], "--candidates must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (["--kernel", "rows"], "invalid choice: 'rows'"),
    ],
)
def test_arguments_out_of_range(given: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        tune.main(given)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def command(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "rhythm_kernels.tuning", *TINY, "--candidates", "1", "--kernel", "band_rows"],
        cwd=ROOT, env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_gpu_it_says_so() -> None:
    done = command()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("Nothing to tune: Triton kernels need a GPU") and done.stderr.count("\n") == 1


def test_interpreted_times_are_called_meaningless() -> None:
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "these times say nothing about any GPU" in done.stdout and "1 timed" in done.stdout
    assert tile_file.cache_path().parent.is_dir()  # of the environment that it inherited


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tile, ...]]:
    """Two candidates for band_rows, one of which is the favourite, and one for row_stats."""
    found = {
        "band_rows": (FAVOURITE["band_rows"], Tile(16, 64, 1, 1)), "row_stats": (Tile(16, 16, 1, 1),)
    }  # fmt: skip
    monkeypatch.setitem(configs.CANDIDATES, ARCH, found)
    return found


def test_the_shortlist_is_timed_beside_the_table(
    short: dict[str, tuple[Tile, ...]], favourites: None, tmp_path: Path, capsys: Any
) -> None:
    """A row for the table's tile and each candidate, of the kernels there are candidates for, printed and saved."""
    path = tmp_path / "rows.jsonl"
    assert tune.main([*TINY, "--shortlist", "--seconds", "100", "--save", str(path)]) == 0
    rows = lines(path)
    want = [(name, tile) for name in ("band_rows", "row_stats") for tile in (TABLE[name], *short[name])]
    assert [(row["kernel"], Tile(**row["tile"])) for row in rows] == want
    assert [row["table"] for row in rows] == [True, False, False, True, False]
    assert [(row["ms"], row["table_ms"]) for row in rows] == [
        (2.0, 2.0),
        (1.0, 2.0),
        (2.0, 2.0),
        (2.0, 2.0),
        (2.0, 2.0),
    ]
    out = capsys.readouterr().out
    assert out.count("the table's") == len(rows) and "0.500 of the table's" in out


def test_a_candidate_that_fails_is_a_line(
    short: dict[str, tuple[Tile, ...]], favourites: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, or gives: the next one has its turn."""
    for change, reason in ((lambda x, rule: x + 1e-3, "wrong: waad"), (lambda x, rule: x / None, "does not run: ")):
        with monkeypatch.context() as patch:
            corrupt(patch, change)
            rows = shortlist.shortlist(DEVICE, 100.0, ["band_rows"], WORKLOAD, tmp_path / "rows.jsonl")
        assert [row.get("objection", "")[: len(reason)] for row in rows] == ["", reason, ""]
        assert [("ms" in row) for row in rows] == [True, False, True]
    assert len(lines(tmp_path / "rows.jsonl")) == 6  # added to


def test_a_kernel_whose_own_tile_fails_is_a_line(
    short: dict[str, tuple[Tile, ...]], favourites: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing\nat all")

    monkeypatch.setattr(passes, "band_rows", fails)
    rows = shortlist.shortlist(DEVICE, 100.0, workload=WORKLOAD)
    assert rows[0]["objection"] == "no such thing" and [row["kernel"] for row in rows[1:]] == ["row_stats"] * 2


def test_the_shortlist_keeps_its_budget(
    short: dict[str, tuple[Tile, ...]], favourites: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A clock on which every run takes four seconds: no candidate and no kernel begins after five."""
    now = 0.0
    honest = trial.outputs

    def outputs(kernel: str, given: Any) -> Any:
        nonlocal now
        now += 4.0
        return honest(kernel, given)

    monkeypatch.setattr(trial, "outputs", outputs)
    rows = shortlist.shortlist(DEVICE, 9.0, None, WORKLOAD, clock=lambda: now)
    out = capsys.readouterr().out
    # Attention for the arguments and the table's run take eight: one candidate is begun.
    assert [(row["kernel"], row["table"]) for row in rows] == [("band_rows", True), ("band_rows", False)] and now == 12
    assert "out of time before 16 x 64" in out and "out of time before row_stats" in out


def test_compiling_in_advance_runs_each_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every job is in one worker's share, and a share is run as it is told; a job that fails does not end it."""
    started: list[list[Any]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(json.loads(command[-1]))

        def wait(self, timeout: float = 0.0) -> int:
            return 0

        def kill(self) -> None:
            pass

    monkeypatch.setattr(shortlist.subprocess, "Popen", Process)
    jobs = [shortlist.Job("band_rows", Tile(16 << i, 16, 1, 1)) for i in range(3)]
    shortlist.compile_in_advance([*jobs, shortlist.Job("band_rows", Tile(24, 16, 1, 1))], WORKLOAD, 2, 1.0)
    assert len(started) == 2 and sum(len(share["jobs"]) for share in started) == 4
    ran: list[Tile] = []
    monkeypatch.setattr(shortlist, "outputs", lambda kernel, given: ran.append(choosing.choose(kernel, ARCH, 32, SIZE)))
    failed = [line for share in started for line in shortlist.compile_jobs(json.dumps(share))]
    assert sorted(ran) == sorted([*(tile for _, tile in jobs), Tile(24, 16, 1, 1)]) and not failed
    monkeypatch.setattr(shortlist, "outputs", trial.outputs)
    failed = [line for share in started for line in shortlist.compile_jobs(json.dumps(share))]
    assert len(failed) == 1 and failed[0].startswith("band_rows [24, 16")


def test_candidates_of_the_tables_are_others() -> None:
    for arch, kernels in configs.CANDIDATES.items():
        for kernel, candidates in kernels.items():
            bits = 32 if arch == "interpreter" else 16
            assert configs.listed(kernel, arch, bits, 128) not in candidates and len(set(candidates)) == len(candidates)


@pytest.mark.long
def test_compiled_candidates(tmp_path: Path) -> None:
    """Kernels as they are compiled and kept by Triton itself: spills and what does not fit are found."""
    path = tmp_path / "tiles.json"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.tune_without_gpu", "--length", "64", "--candidates", "7",
         "--kernel", "column_stats", "--save", path, "--seconds", "300"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "spills: 5 words, the table's 0" in done.stdout
    assert "does not run: out of resource: shared memory" in done.stdout
    assert "0.50 of its time" in done.stdout
    [entry] = json.loads(path.read_text())["tiles"]
    table = configs.listed("column_stats", "sm_80", 16, 128)
    assert Tile(**entry["tile"]) == table._replace(rows=16) and (entry["bits"], entry["head_size"]) == (16, 128)


@pytest.mark.gpu
def test_on_the_device(tmp_path: Path, capsys: Any) -> None:
    """Real times: some candidate is right, and whatever wins can be read again."""
    path = tmp_path / "tiles.json"
    kernels = ["band_rows", "attention_dkv"]
    given = ["--length", "1024", "--head-size", "64", "--candidates", "3", "--seconds", "30", "--save", str(path)]
    assert tune.main([*given, *(word for name in kernels for word in ("--kernel", name))]) == 0
    assert capsys.readouterr().out.count(" timed") == len(kernels)
    assert tile_file.load(path, ARCH, TILES[ARCH]).keys() <= {(name, 16, 64) for name in kernels}
