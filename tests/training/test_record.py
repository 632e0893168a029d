"""Responses on disk: what is valid after a cut at any write, and what of another evaluation is left alone."""

from __future__ import annotations

import json
import os

import pytest

from training import folder as files
from training.evaluation import record as records
from training.evaluation.record import Record, differs, finished
from training.settings import RecipeError

IDENTITY = {"model": "abc", "eval": {"seed": 1, "samples": {"easy": 2}}}
LINES = [[{"kind": "sampled", "text": f"{batch} {i} \u2028 \ud800 é"} for i in range(2)] for batch in range(3)]


class Killed(BaseException):
    """A process that ends here and now: nothing cleans up."""


def carry_out(folder, identity=IDENTITY, overwrite=False):
    """What an evaluation does: each batch that is missing, then the end. The random numbers are the batch's number."""
    if finished(folder, identity) is not None:
        return
    record = Record(folder, identity, overwrite)
    start = len(record.lines) // 2
    assert record.random == (None if start == 0 else {"cpu": str(start - 1)})
    assert record.lines == [line for batch in LINES[:start] for line in batch]
    for number in range(start, 3):
        record.add(LINES[number], {"cpu": str(number)})
    record.finish(json.dumps({"figures": 1, "identity": identity}))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    carry_out(tmp_path / "whole")
    found = content(tmp_path / "whole")
    assert set(found) == {"responses.jsonl", "evaluation.json"}
    lines = found["responses.jsonl"].decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [line for batch in LINES for line in batch]
    return found


def test_a_cut_at_any_write_changes_nothing_in_the_end(tmp_path, monkeypatch, whole):
    """Killed before or after the n-th time that a file is synchronised, renamed, cut or removed, for every n."""
    cuts = 0
    for after in (False, True):
        for at in range(1, 100):
            folder, calls = tmp_path / f"{after}-{at}", iter(range(1, 1000))

            def cut(inner, after=after, at=at, calls=calls):
                def call(*arguments, **named):
                    last = next(calls) == at
                    if last and not after:
                        raise Killed
                    result = inner(*arguments, **named)
                    if last:
                        raise Killed
                    return result

                return call

            with monkeypatch.context() as patch:
                patch.setattr(records.os, "fsync", cut(os.fsync))
                patch.setattr(files.os, "replace", cut(os.replace))
                patch.setattr(type(folder), "unlink", cut(type(folder).unlink))
                patch.setattr(type(folder), "write_text", cut(type(folder).write_text))
                try:
                    carry_out(folder)
                    break
                except Killed:
                    cuts += 1
            if (folder / "responses.jsonl").exists() and not (folder / "evaluation.json").exists():
                with (folder / "responses.jsonl").open("ab") as file:
                    file.write(b'{"kind": "sam')  # of a batch that was being written
            carry_out(folder)
            left = content(folder)
            left.pop("responses.state.partial", None)
            assert left == whole
    assert cuts >= 20


def test_a_finished_one_is_left_as_it_is(tmp_path, whole):
    folder = tmp_path / "whole"
    before = (folder / "evaluation.json").stat()
    carry_out(folder)
    carry_out(folder, overwrite=True)
    assert (folder / "evaluation.json").stat() == before
    assert finished(folder, IDENTITY) == {"figures": 1, "identity": IDENTITY}
    assert finished(folder, IDENTITY | {"model": "b"}) is None


@pytest.mark.parametrize("state", ["finished", "cut off", "foreign", "old"])
def test_another_evaluation_is_not_touched(tmp_path, state):
    folder = tmp_path / "folder"
    if state in ("foreign", "old"):
        folder.mkdir()
        (folder / ("responses.jsonl" if state == "foreign" else "evaluation.json")).write_text("{}\n")
    else:
        carry_out(folder) if state == "finished" else Record(folder, IDENTITY).add(LINES[0], {"cpu": "0"})
    before, other = content(folder), IDENTITY | {"model": "b"}
    with pytest.raises(RecipeError, match=r"is of another evaluation.*; --overwrite removes it and begins anew"):
        Record(folder, other)
    assert content(folder) == before
    record = Record(folder, other, overwrite=True)
    assert content(folder) == before  # until there is something to put in its place
    assert record.lines == []
    carry_out(folder, other, overwrite=True)
    assert finished(folder, other) is not None
    assert json.loads((folder / "evaluation.json").read_text())["identity"] == other


def test_what_differs_is_named(tmp_path):
    Record(tmp_path, IDENTITY).add(LINES[0], {"cpu": "0"})
    with pytest.raises(RecipeError, match=r"another evaluation: eval\.samples\.easy was 2, is 4;"):
        Record(tmp_path, {"model": "abc", "eval": {"seed": 1, "samples": {"easy": 4}}})
    assert differs({"a": 1}, {"a": 1, "b": 2}) == "b was None, is 2"
    assert differs({"a": {"x": 1}}, {"a": {"x": 1}}) == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("responses.jsonl", "", "is not what this evaluation wrote"),
        ("responses.jsonl", "x" * 1000, "is not what this evaluation wrote"),
        ("responses.state", "{", "cannot be read"),
        ("responses.state", "[]", "cannot be read: it must be a mapping"),
        (
            "responses.state",
            '{"bytes": "x", "sha256": "", "identity": {}}',
            "cannot be read: bytes must be a whole number",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    Record(tmp_path, IDENTITY).add(LINES[0], {"cpu": "0"})
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=message):
        Record(tmp_path, IDENTITY)
    carry_out(tmp_path, overwrite=True)
    assert finished(tmp_path, IDENTITY) is not None


def test_nothing_is_made_before_the_first_response(tmp_path):
    Record(tmp_path / "new", IDENTITY)
    assert not (tmp_path / "new").exists()
