"""The task `maths`: published forms of rows (in words of our own), settings, prompts, rewards and figures."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from training.published import LONGEST, bare, boxed
from training.task import find
from training.tasks.maths import Maths
from training.tasks.maths.answers import depth, gold

ASK = "Let's think step by step and output the final answer within \\boxed{}."
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
Q = "A crate holds 12 jars of $\\frac{1}{2}$ kg. How heavy are they, in kg?"


def verl(prompt, truth, **extra):
    return {
        "data_source": "some/set",
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "test", "index": 0, **extra},
    }


# A row of each published set: its columns and their forms, the answer expected of it
PUBLISHED = {
    "GSM8K": ({"question": Q, "answer": "12 / 2 = <<12/2=6>>6.\n#### 6"}, ["6"]),
    "GSM8K with thousands": ({"question": Q, "answer": "It is 1,200 kg.\n#### 1,200"}, ["1200"]),
    "MATH": (
        {"problem": Q, "level": "Level 2", "type": "Algebra", "solution": "Half of 12 is $\\boxed{\\frac{12}{2}}$."},
        ["\\frac{12}{2}"],
    ),
    "MATH-500": (
        {
            "problem": Q,
            "solution": "It is $\\boxed{6}$.",
            "answer": "6",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "a/1",
        },
        ["6"],
    ),
    "AIME 24": (
        {"id": 60, "problem": Q, "solution": "Half of 12.", "answer": "006", "url": "https://a.org", "question": Q},
        ["006"],
    ),
    "AIME 25": ({"problem": Q, "answer": "6", "id": "0"}, ["6"]),
    "AMC 23": ({"id": 0, "problem": Q, "answer": 6.0, "url": "https://a.org", "question": Q}, ["6"]),
    "Minerva": (
        {
            "problem": Q,
            "solution": "First \\boxed{5}, no: \\[\nm=\\boxed{6.0} \\mathrm{~kg}\n\\]",
            "type": "X",
            "idx": 0,
        },
        ["6.0"],
    ),
    "OlympiadBench": (
        {
            "id": 1,
            "subfield": "Algebra",
            "context": None,
            "question": Q,
            "solution": ["Half of 12.", "Or so."],
            "final_answer": ["$\\frac{12}{2}$"],
            "is_multiple_answer": False,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        },
        ["\\frac{12}{2}"],
    ),
    "DAPO-Math-17k": (verl(DAPO.format(Q), "6", index="9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"), ["6"]),
    "DAPO-Math-17k processed": (
        {"prompt": Q, "solution": "6", "source_prompt": [{"role": "user", "content": DAPO.format(Q)}]}
        | {"reward_model": {"ground_truth": "6", "style": "rule"}, "extra_info": {"index": "a"}},
        ["6"],
    ),
    "verl's GSM8K": (verl(f"{Q} {ASK}", "6", question=Q, answer="12 / 2 = 6.\n#### 6"), ["6"]),
    "verl's lists": (verl(f"{Q} {ASK}", ["6\n", "$\\frac{12}{2}$", "6"]), ["6", "\\frac{12}{2}"]),
}


def maths(tmp_path, content, name="rows.jsonl", **settings):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return Maths(Maths.Settings("maths", test=str(path), **settings))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_they_are_published(tmp_path, name, kind):
    row, answer = PUBLISHED[name]
    task = maths(tmp_path, [row], f"rows.{kind}")
    assert task.instances("test", None) == [{"question": Q, "answer": answer}]
    assert task.rewards["correctness"]([f"\\boxed{{{answer[-1]}}}"], task.instances("test", 1)) == [1.0]
    task.close()


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        (
            {"text": Q, "n": {"a": 1}},
            {},
            "question must be named, got None: none of the columns text, n.a is one of question, problem, prompt",
        ),
        (
            {"question": Q, "problem": "another", "answer": 1},
            {},
            "question must be named, got None: the columns question",
        ),
        ({"question": Q}, {}, "row 1: answer must be named, got None: none of the columns question is one of answer,"),
        ({"question": Q, "answer": 1, "ground_truth": 2}, {}, "answer, ground_truth differ"),
        (
            {"question": Q, "answer": 1},
            {"answer": "gold.x"},
            "answer must be a column that is there, got 'gold.x': there",
        ),
        ({"question": Q, "answer": True}, {}, "row 1: answer must be a number, text or a list of them, got bool"),
        (
            {"question": Q, "answer": "word " * 900},
            {},
            "answer must hold an answer after #### or in \\boxed{...}, or be",
        ),
        ({"question": " ", "answer": 1}, {}, "row 1: question must be text, got nothing"),
        ({"question": 7, "answer": 1}, {}, "row 1: question must be text or chat messages, got 7"),
        (
            {"prompt": Q, "answer": 1},
            {"prompt": "rows"},
            "prompt must be chat messages of role and content, got 'A crate",
        ),
        (
            verl(DAPO.format(Q), "6"),
            {"prompt": "rows"},
            "prompt must ask for \\boxed{} unless boxed_only is false, got",
        ),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, row, settings, said):
    with pytest.raises(ValueError) as caught:
        maths(tmp_path, [row], **settings).instances("test", None)
    assert "rows.jsonl, row 1: " in str(caught.value) and said in str(caught.value)


def test_columns_of_your_own(tmp_path):
    row = {"n": 3, "body": {"text": Q}, "gold": {"value": [6, "6.0"]}, "a.b": 1, "question": "not this", "answer": "no"}
    task = maths(tmp_path, [row], question="body.text", answer="gold.value")
    assert task.instances("test", 1) == [{"question": Q, "answer": ["6", "6.0"]}]


def test_a_row_without_an_answer_is_dropped(tmp_path, capsys):
    """As two of the 24,898 rows of a published mixture are."""
    task = maths(tmp_path, [verl(f"{Q} {ASK}", ""), verl(f"Again: {Q} {ASK}", "6")])
    assert len(task.instances("test", None)) == 1
    assert "1 that have no answer" in capsys.readouterr().out


@pytest.mark.parametrize("empty", [None, float("nan")])
@pytest.mark.parametrize("column", [None, "answer"])
def test_an_empty_cell_of_a_table_is_no_answer(tmp_path, capsys, empty, column):
    """NaN must not become an answer that a response can give."""
    content = [{"question": Q, "answer": 6.0}, {"question": "And then?", "answer": empty}]
    task = maths(tmp_path, content, "rows.parquet", answer=column)
    assert task.instances("test", None) == [{"question": Q, "answer": ["6"]}]
    assert "1 that have no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, f"Problem: {Q}\nReason step by step, and put the final answer within \\boxed{{}}.\nSolution:"),
        (
            {"prompt": "chat", "system": "Be brief."},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{Q}\nReason step by step, and put the final answer within \\boxed{{}}."},
            ],
        ),
        ({"prompt": "rows"}, [{"role": "user", "content": f"{Q} {ASK}"}]),
        ({"prompt": "Q: {question} {x} \\boxed"}, f"Q: {Q} {{x}} \\boxed"),
        ({"prompt": "{question} = ", "boxed_only": False}, f"{Q} = "),
    ],
)
def test_prompts(tmp_path, settings, prompt):
    task = maths(tmp_path, [verl(f"{Q} {ASK}", "6")], **settings)
    assert task.prompt(task.instances("test", 1)[0]) == prompt


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "bsae"}, "prompt must be one of base, chat, rows, or hold {question}, got 'bsae'"),
        ({"prompt": "{question}"}, "prompt must ask for \\boxed{} unless boxed_only is false, got '{question}'"),
        ({"system": "You"}, "system must be null where prompt is not chat, got 'You'"),
        ({"timeout": 0.0}, "timeout must be above 0, got 0.0"),
        ({"workers": 0}, "workers must be at least 1 and at most 256, got 0"),
        ({"train": "a.txt"}, "train must be a file .jsonl, .json, .csv or .parquet, got 'a.txt'"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError) as caught:
        Maths.Settings("maths", **settings)
    assert str(caught.value) == said


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match='name must be a task whose packages are there, got "maths": pip install'):
        Maths(Maths.Settings("maths"))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed 4$.", "4"),
        ("\\boxed  {5}", "5"),
        ("\\boxed{\\frac{1}{2}} {", "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\boxed{6}}", "6"),
        ("\\boxed{ 7\n}", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{8", None),
        ("\\boxed{9} \\boxed{", None),
        ("\\boxedness", None),
        ("boxed{9}", None),
        ("", None),
        ("\\boxed{" + "1" * LONGEST + "}", "1" * LONGEST),
        ("\\boxed{" + "1" * (LONGEST + 1) + "}", None),
    ],
)
def test_the_last_box(text, inside):
    assert boxed(text) == inside


def test_answers_of_rows():
    assert gold("a \\boxed{5} #### $1,234.50") == ["1234.50"]
    assert gold("no #### \n") == ["no ####"]
    assert gold("(1,234)") == ["(1,234)"]  # a pair: commas are dropped after #### alone
    assert gold("\\$5") == ["\\$5"]
    assert gold([1, 1.0, "1"]) == ["1"]
    assert gold(0.25) == ["0.25"] and gold(-3) == ["-3"] and gold("") == gold([]) == []


def test_brackets_in_one_another():
    assert depth("") == 0 and depth(")))((") == 2 and depth("([{}])()") == 3


def test_known_instructions_are_taken_off():
    assert bare(f"{Q} {ASK}") == bare(DAPO.format(Q)) == bare(f" {Q}\n") == Q
    assert bare(f"{Q} {ASK[:19]}") == f"{Q} {ASK[:19]}"


def test_a_question_that_leaks_under_another_instruction(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(verl(DAPO.format(q), "6")) for q in (Q, "New?")))
    task = maths(tmp_path, [verl(f"{Q.upper()} {ASK}", "6")], train=str(tmp_path / "train.jsonl"))
    assert [one["question"] for one in task.instances("train", None)] == ["New?"]
    assert "1 that test asks too" in capsys.readouterr().out


def test_rewards_counts_and_figures(tmp_path):
    task = maths(tmp_path, [{"question": Q, "answer": 6}], timeout=1.0)
    (instance,) = task.instances("test", 1)
    responses = ["\\boxed{6.0}", "\\boxed{7}", "6", "\\boxed{(10^9)!}"]
    assert task.rewards["correctness"](responses, [instance] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert task.rewards["format"](responses, [instance] * 4) == [1.0, 1.0, 0.0, 1.0]
    assert [task.correct(response, instance) for response in responses] == [True, False, False, False]
    counts = [task.counts(response, instance) for response in responses]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    assert totals == {"boxed": 3, "boxed_right": 1, "not_judged": 1}
    figures = task.figures(totals, 4, 1)
    assert {name: figure.value for name, figure in figures.items()} == {
        "boxed": 0.75,
        "boxed_right": 1 / 3,
        "not_judged": 0.25,
    }
    assert all(figure.value == 0 for figure in task.figures(dict.fromkeys(totals, 0), 0, 0).values())
    assert task.label(instance) == "A crate holds 12 jars of $\\frac{1}{2}$ kg. ..."
    assert task.describe() == "maths (rows.jsonl)"
    task.close()


def test_equal_answers_are_judged_once(tmp_path, monkeypatch):
    task, asked = maths(tmp_path, [{"question": Q, "answer": 6}]), []
    judge = task._judge.pool.judge
    monkeypatch.setattr(task._judge.pool, "judge", lambda requests: asked.extend(requests) or judge(requests))
    instances = task.instances("test", 1) * 64
    assert (
        task.rewards["correctness"](["\\boxed{6}", "\\boxed{5}", "a \\boxed{5}", ""] * 16, instances)
        == [1, 0, 0, 0] * 16
    )
    assert task.counts("b \\boxed{5}", instances[0])["boxed"] == 1
    assert [request.answer for request in asked] == ["5"]
    task.close()


@pytest.mark.parametrize("prompt", ["base", "chat", "rows"])
def test_the_stand_in_needs_no_file(prompt, capsys):
    files = {"train": "hf://datasets/a/b/c.parquet", "validation": "no.csv", "test": {"x": "x.json", "y": "y.json"}}
    given = Maths.Settings("maths", **files, question="q", answer="a", prompt=prompt, train_size=9999, workers=1)
    task = Maths(given).stand_in()
    sizes = {split: len(task.instances(split, None)) for split in files}
    assert sizes == {"train": 16, "validation": 4, "test": 8}
    assert {one["set"] for one in task.instances("test", None)} == {"x", "y"}
    questions = [{one["question"] for one in task.instances(split, None)} for split in files]
    assert len(set.union(*questions)) == 16 + 4 + 4
    assert "dropped" not in capsys.readouterr().out
    train = task.instances("train", None)
    assert task.rewards["correctness"]([f"\\boxed{{{one['answer'][0]}}}" for one in train], train) == [1.0] * 16
    assert all(isinstance(task.prompt(one), str if prompt == "base" else list) for one in train)


def test_the_fixture_is_right():
    """Each worked answer of it ends in the answer; found by name, as a recipe finds it."""
    task = find("maths")(Maths.Settings("maths", train="a.jsonl", test="a.jsonl", validation="a.jsonl")).stand_in()
    from_solutions = type(task)(Maths.Settings("maths", answer="extra_info.answer", test=task.settings.train))
    assert {(one["question"], *one["answer"]) for one in from_solutions.instances("test", None)} == {
        (one["question"], *one["answer"]) for one in task.instances("train", None)
    }
