"""Rows of files: how each kind is read and refused, and splits that share no question."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pyarrow
import pytest
from pyarrow import parquet

from training import row_files
from training.rows import FileSettings, FileTask, Unreachable, read_rows

ROWS = [{"question": "How many legs have 3 spiders?", "answer": "24"}, {"question": "2 + 2, naïvely", "answer": "4"}]


def write(path, content):
    """A file of the rows, or of text as it is; its path as text."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".csv":
        lines = [",".join(content[0]), *(",".join(f'"{value}"' for value in row.values()) for row in content)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        text = json.dumps(content) if path.suffix == ".json" else "\n".join(map(json.dumps, content))
        path.write_text(text + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_each_kind_of_file(tmp_path, name):
    assert read_rows(write(tmp_path / name, ROWS)) == ROWS


def test_lines_of_json_in_a_json_file_and_blank_lines(tmp_path):
    lines = "\ufeff\n" + "\n\n".join(map(json.dumps, ROWS))
    assert read_rows(write(tmp_path / "rows.json", lines)) == read_rows(write(tmp_path / "a.jsonl", lines)) == ROWS


def test_where_relative_paths_begin(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "own.jsonl", ROWS)
    monkeypatch.setattr(row_files, "ROOT", tmp_path)
    assert read_rows("here/own.jsonl") == ROWS
    monkeypatch.setattr(row_files, "ROOT", tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_rows("~/here/own.jsonl") == ROWS
    monkeypatch.chdir(tmp_path)
    assert read_rows("here/own.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "row 2 must be a mapping of columns, got list"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: nested too deep"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", "\n", "it holds no rows"),
        ("a.json", "[]", "it holds no rows"),
        ("a.json", '[{"a": 1}', "not JSON"),
        ("a.csv", "", "it holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has fewer fields than the 2 columns"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 has more fields than the 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', "unexpected end of data"),
        ("a.parquet", "PAR1 no", "not parquet that can be read"),
        ("a.parquet", "", "not parquet that can be read"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(path) and said in str(caught.value)


def test_what_is_not_there_can_be_told_from_what_cannot_be_read(tmp_path):
    with pytest.raises(Unreachable, match=r"no\.jsonl: there is no such file"):
        read_rows(str(tmp_path / "no.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OSError, match=r"folder\.jsonl: Is a directory") as caught:
        read_rows(str(tmp_path / "folder.jsonl"))
    assert not isinstance(caught.value, Unreachable)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setattr(row_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="to read parquet, install pyarrow"):
        read_rows(path)


class TestHub:
    """`hf://` names, and a hub that does not answer."""

    FILE = "hf://datasets/someone/sums/main/test.parquet"

    @pytest.fixture(autouse=True)
    def _forget(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        forget = row_files.unreachable.cache_clear
        forget()
        yield
        forget()

    @pytest.mark.parametrize("answer", ["nobody", "a proxy that refuses"])
    def test_offline_is_told_at_once(self, monkeypatch, answer):
        def head(*_, **__):
            if answer == "nobody":
                raise ConnectionError("Name or service not known")
            return type("Response", (), {"status_code": 503})

        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: type("Client", (), {"head": head}))
        begun = time.monotonic()
        with pytest.raises(Unreachable, match=r"test\.parquet: the hub cannot be reached .* is not cached"):
            read_rows(self.FILE)
        assert time.monotonic() - begun < 5

    @pytest.mark.parametrize(
        ("name", "asked"),
        [
            (FILE, ("someone/sums", "main/test.parquet", None)),
            (
                "hf://datasets/someone/sums@refs%2Fconvert%2Fparquet/a/b.jsonl",
                ("someone/sums", "a/b.jsonl", "refs/convert/parquet"),
            ),
        ],
    )
    def test_what_the_hub_is_asked_for(self, tmp_path, monkeypatch, name, asked):
        def download(repository, file, *, repo_type, revision, local_files_only):
            assert ((repository, file, revision), repo_type, local_files_only) == (asked, "dataset", False)
            return write(tmp_path / file.rpartition("/")[2], ROWS)

        monkeypatch.setattr(row_files, "unreachable", lambda: "")
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        assert read_rows(name) == ROWS

    def test_a_hub_that_refuses_is_not_unreachable(self, monkeypatch):
        from huggingface_hub.errors import EntryNotFoundError

        def download(*_, **__):
            raise EntryNotFoundError("404 Client Error.\n\nEntry not found")

        monkeypatch.setattr(row_files, "unreachable", lambda: "")
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(OSError, match=r"test\.parquet: 404 Client Error\. Entry not found") as caught:
            read_rows(self.FILE)
        assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train", "rows.txt", "train must be a file .jsonl, .json, .csv or .parquet, got 'rows.txt'"),
        ("test", {}, "test must be a file, or files by the names of their sets, got {}"),
        ("test", {3: "a.jsonl"}, "test must be a file, or files by the names of their sets, got {3: 'a.jsonl'}"),
        ("test", {"amc": None}, "test.amc must be a file .jsonl, .json, .csv or .parquet, got None"),
        ("validation", "hf://sums/a.csv", "validation must be hf://datasets/OWNER/NAME[@REVISION]/PATH/FILE, got"),
    ],
)
def test_settings_are_checked(key, value, said):
    with pytest.raises(ValueError) as caught:
        FileSettings("sums", **{key: value})
    assert str(caught.value).startswith(said)


class Sums(FileTask):
    """A task of two columns."""

    @dataclass
    class Settings(FileSettings):
        pass

    def parse(self, row):
        if "question" not in row:
            raise ValueError(f"it has no question: there are {', '.join(row)}")
        return row if row["answer"] else None

    def prompt(self, instance):
        return instance["question"]

    def correct(self, response, instance):
        return response == instance["answer"]


def rows(*questions):
    return [{"question": question, "answer": "1"} for question in questions]


def asked(task, split, size=None):
    return [instance["question"] for instance in task.instances(split, size)]


def test_of_several_processes_one_says_what_was_dropped(tmp_path, capsys, monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert asked(Sums(Sums.Settings("sums", train=write(tmp_path / "train.jsonl", rows("a", "a")))), "train") == ["a"]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_splits_share_no_question_and_say_what_was_dropped(tmp_path, capsys, kind):
    train = write(tmp_path / f"train.{kind}", rows("e", "a", "a", "B", " b ", "C\tc", "t", "d", "a"))
    validation = write(tmp_path / f"validation.{kind}", rows("c C", "T", "v"))
    task = Sums(Sums.Settings("sums", train=train, validation=validation, test=write(tmp_path / "t.json", rows("t"))))
    assert asked(task, "train") == ["e", "a", "B", "d"]  # in the order of the file
    assert sorted(asked(task, "validation")) == ["c C", "v"]
    assert capsys.readouterr().out == (
        f"validation: 2 questions of {validation}; dropped rows: 1 that test asks too\n"
        f"train: 4 questions of {train}; dropped rows: 3 that ask what an earlier one asks, "
        "1 that validation asks too, 1 that test asks too\n"
    )


def test_files_are_read_once(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    task = Sums(Sums.Settings("sums", train=write(path, rows("a", "a"))))
    first = task.instances("train", None)
    path.unlink()
    assert task.instances("train", None) == first
    assert capsys.readouterr().out.count("\n") == 1


def test_held_out_questions_are_a_fair_sample_that_grows(tmp_path):
    names = [f"{number} apples" for number in range(400)]
    paths = [write(tmp_path / "a.jsonl", rows(*names)), write(tmp_path / "b.jsonl", rows(*reversed(names)))]
    one, other = (Sums(Sums.Settings("sums", test=path)) for path in paths)
    some = asked(one, "test", 100)
    assert some == asked(one, "test")[:100] == asked(other, "test", 100)  # the order is the questions' own
    early = sum(int(name.split()[0]) < 200 for name in some)
    assert 30 <= early <= 70  # 4 standard deviations around 50


def test_several_test_sets_take_turns(tmp_path):
    few, many = write(tmp_path / "few.jsonl", rows("a", "b")), write(tmp_path / "many.jsonl", rows(*"abcdefgh"))
    task = Sums(Sums.Settings("sums", test={"few": few, "many": many}))
    assert [one["set"] for one in task.instances("test", 5)] == ["few", "many", "few", "many", "many"]
    assert len(task.instances("test", None)) == 10  # a question of two sets is one of each


def test_no_question_of_any_test_set_is_trained_on(tmp_path, capsys):
    sets = {"one": rows("a", "both"), "two": rows("b", "both"), "three": rows("c")}
    files = {name: write(tmp_path / f"{name}.jsonl", content) for name, content in sets.items()}
    left = {"train": rows(*"abcde", "both"), "validation": rows(*"abcd", "both")}
    own = {split: write(tmp_path / f"{split}.jsonl", content) for split, content in left.items()}
    task = Sums(Sums.Settings("sums", test=files, **own))
    assert asked(task, "train") == ["e"] and asked(task, "validation") == ["d"]
    assert len(task.instances("test", None)) == 5
    assert capsys.readouterr().out.count("4 that test asks too") == 2


def test_questions_are_told_apart_however_accents_are_written(tmp_path):
    train, test = (write(tmp_path / f"{one!r}.jsonl", rows(one)) for one in ("caf\u00e9?", "cafe\u0301?"))
    with pytest.raises(ValueError, match=r"train must hold .*, got .*: dropped rows: 1 that test asks too"):
        Sums(Sums.Settings("sums", train=train, test=test)).instances("train", None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"problem": "1 + 1", "answer": "2"}], "row 1: it has no question: there are problem, answer"),
        ([*rows("a"), {"text": "b"}], "row 2: it has no question: there are text"),
    ],
)
def test_what_a_row_lacks(tmp_path, content, said):
    task = Sums(Sums.Settings("sums", train=write(tmp_path / "a.jsonl", content)))
    with pytest.raises(ValueError, match=f"a.jsonl, {said}"):
        task.instances("train", None)


def test_splits_that_cannot_be_had(tmp_path):
    path = write(tmp_path / "a.jsonl", rows("a", "b"))
    task = Sums(Sums.Settings("sums", test=path, validation=path))
    with pytest.raises(ValueError, match="train must be a file, got None"):
        task.instances("train", 1)
    with pytest.raises(ValueError, match=r"test must hold at least 3 questions, got 2 in .*a\.jsonl"):
        task.instances("test", 3)
    with pytest.raises(ValueError, match=r"validation must hold .*, got .*a\.jsonl.*: 2 that test asks too"):
        task.instances("validation", None)


def test_rows_without_an_answer_are_dropped(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": ""}, *rows("b")])
    assert asked(Sums(Sums.Settings("sums", train=path)), "train") == ["b"]
    assert "1 that have no answer" in capsys.readouterr().out
    without = write(tmp_path / "b.jsonl", [{"question": one, "answer": ""} for one in "abc"])
    with pytest.raises(ValueError, match=r"train must hold .*, got .*rows: 3 that have no answer$"):
        Sums(Sums.Settings("sums", train=without, test=path)).instances("train", None)


NESTED = {"prompt": [{"role": "user", "content": "a"}], "gold": {"all": ["1", "2"], "n": 1}, "x": None, "on": True}
VARIANTS = [
    {"prompt": [{"role": "user", "content": "b"}]},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]},
    {"prompt": []},
    {"prompt": None},
    {"gold": {"all": ["1"], "n": 1}},
    {"gold": {"all": ["12"], "n": 1}},
    {"gold": {"all": ["1", "2"], "n": 2}},
    {"gold": {"all": ["1", None], "n": 1}},
    {"gold": None},
    {"x": 0.5},
    {"on": False},
]


def test_equal_rows_of_parquet_are_told_in_arrow(tmp_path, monkeypatch):
    """Rows of nested columns, over several batches: only equal ones are left out."""
    monkeypatch.setattr(row_files, "_BATCH", 4)
    different = [NESTED, *({**NESTED, **variant} for variant in VARIANTS)]
    path = write(tmp_path / "a.parquet", [one for one in different for _ in range(3)])
    found = list(row_files.rows(path, distinct=True))
    assert [number for number, _ in found] == list(range(1, 3 * len(different) + 1))
    assert [row for _, row in found if row is not None] == different


@pytest.mark.long
def test_a_set_published_a_hundred_times_over_is_read_in_seconds(tmp_path):
    """As DAPO-Math-17k is: 1.8 million rows of 17,900 questions."""
    one = [{"prompt": [{"role": "user", "content": f"{i} plus {i} is? " * 20}], "n": i} for i in range(17_900)]
    table = pyarrow.Table.from_pylist(one)
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as file:
        for _ in range(100):
            file.write_table(table)
    begun = time.monotonic()
    kept = [row for _, row in row_files.rows(str(tmp_path / "a.parquet"), distinct=True) if row is not None]
    assert kept == one
    assert time.monotonic() - begun < 60
