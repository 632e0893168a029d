"""A run cut off at every change of a file: what readers find is one run or none, and a finished one is never lost."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from .fake_run import begin, read, start, whole


class Crash(BaseException):
    """Stands for kill -9: from the first one on, nothing changes on the disk any more."""


class Disk:
    """Counts the changes to files under a folder and, from the n-th on, refuses them all.

    By an audit hook, which sees what Python itself opens, renames and removes: the test knows nothing of how the
    folder is written. Hooks cannot be taken away, so there is one, and it can be asleep.
    """

    def __init__(self):
        self.root, self.left = None, None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.root is None:
            return
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path = arguments[0] if arguments else None
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")
        if not changes or not isinstance(path, str | os.PathLike):
            return
        # rmtree removes by names relative to a descriptor: those count as well
        if os.path.isabs(path) and not Path(path).is_relative_to(self.root):
            return
        if self.left == 0:
            raise Crash
        self.left -= 1

    def run(self, root, changes, act):
        """Call `act` on a disk that stops after so many changes under `root`; returns how many were left over."""
        self.root, self.left = root, changes
        try:
            act()
        except Crash:
            pass
        finally:
            self.root = None
        return self.left


DISK = Disk()


def count_changes(folder, act):
    return 10**6 - DISK.run(folder, 10**6, act)


EVERY = pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])


@EVERY
def test_a_run_cut_off_anywhere(fast, tmp_path, capsys, stride):
    """A second run cut off at any change of a file: all readers find one run or none, and one is never lost."""
    first = tmp_path / "first"
    start(first, 1)
    assert whole(first, fast, tmp_path) == 1
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shutil.copytree(first, tmp_path / "all" / "run")
    changes = count_changes(tmp_path / "all", lambda: start(tmp_path / "all" / "run", 2))
    assert changes > 10
    assert whole(tmp_path / "all" / "run", fast, scratch) == 2
    seen = set()
    for n in range(0, changes + 1, stride):
        run = tmp_path / str(n) / "run"
        shutil.copytree(first, run)
        DISK.run(run, n, lambda: start(run, 2))  # noqa: B023
        read(run, fast, scratch)
        here, before = whole(run, fast, scratch), whole(run / "previous", fast, scratch)
        moving = whole(run / "previous.partial", fast, scratch) or (run / "previous.partial").exists()
        seen.add((here, before))
        assert here or before or moving, n
        start(run, 3)  # a third run goes through, whatever it finds, and leaves itself alone
        assert whole(run, fast, scratch) == 3
        assert not any("previous" in p.name or "partial" in p.name for p in run.iterdir())
    assert stride > 1 or seen >= {(1, None), (None, 1), (2, 1), (2, None)}
    assert len(seen) > 1
    capsys.readouterr()


@pytest.mark.long
def test_a_third_run_cut_off_keeps_the_finished_one(fast, tmp_path, capsys):
    """Two runs cut off in a row, anywhere: the finished one before them can still be read, here or in `previous`."""
    first, scratch = tmp_path / "first", tmp_path / "scratch"
    scratch.mkdir()
    start(first, 1)
    shutil.copytree(first, tmp_path / "all" / "run")
    changes = count_changes(tmp_path / "all", lambda: start(tmp_path / "all" / "run", 2))
    for n in range(1, changes + 1, 4):
        second = tmp_path / f"{n}" / "run"
        shutil.copytree(first, second)
        DISK.run(second, n, lambda: start(second, 2))  # noqa: B023
        for m in range(n % 7, 45, 7):
            run = tmp_path / f"{n}-{m}" / "run"
            shutil.copytree(second, run)
            DISK.run(run, m, lambda: start(run, 3))  # noqa: B023
            found = [whole(p, fast, scratch) for p in (run, run / "previous")]
            assert any(found) or (run / "previous.partial").exists(), (n, m)
            if not any(found):  # cut off while the names move: the next start completes that
                begin(run, 4)
                assert whole(run / "previous", fast, scratch) in (1, 2), (n, m)
            shutil.rmtree(run.parent)
    capsys.readouterr()
