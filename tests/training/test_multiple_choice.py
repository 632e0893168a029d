"""The task of lettered options: whose letter a response has, what it earns, and the rows of published data sets."""

import json
import random
import time

import pytest

from training import task
from training.settings import RecipeError
from training.tasks.multiple_choice import MultipleChoice
from training.tasks.multiple_choice.options import listed_in

CITIES = {"A": "Lima", "B": "Paris", "C": "Rome", "D": "a dog"}
QUESTION = {"question": "Which city is on the Seine?", "options": CITIES, "listed": False, "answer": "B"}


def made(**settings) -> MultipleChoice:
    return MultipleChoice(MultipleChoice.Settings("multiple_choice", **settings))


@pytest.mark.parametrize(
    ("response", "letter", "boxed"),
    [
        (r"\boxed{B}", "B", True),
        (r"\boxed{(B)}", "B", True),
        (r"\boxed{\text{B}}", "B", True),
        (r"$\boxed{\mathbf{(B)}}$", "B", True),
        (r"\boxed{\text{b}}", "B", True),
        (r"\boxed{B. Paris}", "B", True),
        (r"\boxed{B: Paris}", "B", True),
        (r"\boxed{Option B}", "B", True),
        (r"\boxed{b}", "B", True),
        (r"\boxed{ b) }", "B", True),
        (r"\boxed{A} no, \boxed{B}", "B", True),  # the last box
        (r"The answer is A, \boxed{B}", "B", True),  # a box before words
        (r"\boxed{B} so the answer is A", "B", True),
        (r"\boxed{Paris}", None, True),  # the letter is asked for
        (r"\boxed{E}", None, True),  # no option
        (r"\boxed{B2}", None, True),
        (r"\boxed{}", None, True),
        (r"<think>\boxed{A}</think> The answer is B.", "B", False),  # thoughts do not answer
        (r"<think>The answer is A", "A", False),  # which never ended
        ("The answer is B.", "B", False),
        ("the ANSWER IS: (B)", "B", False),
        ("The answer is **B**, as shown", "B", False),
        ("The answer is 'B' because", "B", False),
        ("The answer is clearly option B here", "B", False),
        ("The answer is Paris (B)", "B", False),
        ("The answer is b.", "B", False),
        ("Is the answer is A? No, the answer is C", "C", False),  # the last one
        ("The answer is a matter of taste", None, False),
        ("The answer is B-cells", None, False),
        ("The answer is E", None, False),
        ("The answer is", None, False),
        ("B", None, False),
        ("Answer: B", None, False),
        (r"\boxed{B", None, False),  # cut off
        ("", None, False),
    ],
)
def test_which_option_a_response_chooses(response: str, letter: str | None, boxed: bool) -> None:
    choice = made()
    assert choice.counts(response, QUESTION) == {"boxed": int(boxed), "answered": int(letter is not None)}
    rights = {right for right in CITIES if choice.correct(response, QUESTION | {"answer": right})}
    assert rights == ({letter} if letter else set())


def test_what_a_response_earns() -> None:
    cases = {r"\boxed{B}": 1.0, "The answer is B": 0.5, r"\boxed{C}": -0.5, r"\boxed{none}": -0.5}
    cases |= {"The answer is C": -1.0, "I cannot say": -1.0}
    earned = made().rewards["crossthink"](list(cases), [QUESTION] * len(cases))
    assert earned == list(cases.values())
    own = made(right_boxed=2.0, right_unboxed=1.5, wrong_boxed=0.25, wrong_unboxed=0.0).rewards
    assert own["crossthink"](list(cases), [QUESTION] * len(cases)) == [2.0, 1.5, 0.25, 0.25, 0.0, 0.0]
    assert own["correctness"](list(cases), [QUESTION] * len(cases)) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert own["format"](list(cases), [QUESTION] * len(cases)) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_an_option_by_its_text_only_where_that_is_asked_for() -> None:
    for response in (
        r"\boxed{Paris}",
        r"\boxed{\text{paris}}",
        "The answer is Paris.",
        "The answer is Paris\nas shown",
    ):
        assert made(texts=True).correct(response, QUESTION)
        assert not made().correct(response, QUESTION)
    assert made(texts=True).correct(r"\boxed{A dog}", QUESTION | {"answer": "D"})  # not A


def test_figures_of_the_report() -> None:
    choice = made()
    responses = [r"\boxed{B}", "The answer is C", r"\boxed{none}", "no"]
    counted = [choice.counts(response, QUESTION) for response in responses]
    totals = {key: sum(one[key] for one in counted) for key in counted[0]}
    figures = choice.figures(totals, len(responses), right=1)
    assert {key: one.value for key, one in figures.items()} == {"boxed": 0.5, "answered": 0.5, "answered_right": 0.5}
    assert all(one.value == 0 for one in choice.figures({}, 0, 0).values())


PIECES = [
    *(
        "\\boxed{",
        "\\boxed",
        "{",
        "}",
        "answer is",
        "Answer Is",
        "A",
        "B",
        "e",
        "(",
        ")",
        ".",
        ":",
        "*",
        "$",
        "\\text{",
    ),
    *(
        "</think>",
        "<think>",
        "\n",
        " ",
        "\ud800",
        "\x00",
        "é",
        "\u2019",
        "option",
        "\\",
        "Paris",
        "\u0663",
        "\U0001d505",
        "9" * 50,
    ),
]


def test_hostile_text_is_judged_in_bounded_time() -> None:
    rng = random.Random(0)
    choice = made(texts=True)
    rewards = choice.rewards
    slowest = 0.0
    for _ in range(10_000):
        text = "".join(rng.choices(PIECES, k=rng.choice((3, 30, 300))))
        begin = time.process_time()
        values = {name: reward([text], [QUESTION])[0] for name, reward in rewards.items()}
        slowest = max(slowest, time.process_time() - begin)
        assert values["crossthink"] in (1.0, 0.5, -0.5, -1.0)
        assert values["correctness"] in (0.0, 1.0)
        assert (values["correctness"] == 1.0) == (values["crossthink"] > 0)
    assert slowest < 0.1


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "answer is " * 100_000,
        "\\boxed{" + "{" * 500_000,
        "answer is" + " (" * 400_000,
        "A " * 500_000,
    ],
)
def test_long_text_costs_little(text: str) -> None:
    begin = time.process_time()
    assert made(texts=True).rewards["crossthink"]([text], [QUESTION])[0] in (-0.5, -1.0)
    assert time.process_time() - begin < 1.0


TEXT = "Which city is on the Seine?\nA. Lima\nB. Paris\nC. Rome"
LIST, RIGHT = ["Lima", "Paris", "Rome"], {"A": "Lima", "B": "Paris", "C": "Rome"}
FORMATS = {
    "mmlu": {"question": "q", "choices": LIST, "answer": 1, "subject": "geography"},
    "mmlu_pro": {"question": "q", "options": LIST, "answer": "B", "answer_index": 1, "category": "other"},
    "arc": {"question": "q", "choices": {"text": LIST, "label": ["A", "B", "C"]}, "answerKey": "B", "id": "1"},
    "arc, numbered": {"question": "q", "choices": {"text": LIST, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "q", "choices": {"text": LIST, "label": ["A", "B", "C"]}, "answerKey": "B"},
    "medqa": {"question": "q", "options": RIGHT, "answer": "Paris", "answer_idx": "B"},
    "keyed by number": {"question": "q", "options": {"1": "Lima", "2": "Paris", "3": "Rome"}, "answer": 2},
    "one mapping an option": {"question": "q", "options": [{"A": "Lima"}, {"B": "Paris"}], "expected_answer": "B"},
    "in parquet": {"question": "q", "options": [{"A": "Lima", "B": None}, {"A": None, "B": "Paris"}], "label": 1},
    "a column an option": {"question": "q", "A": "Lima", "B": "Paris", "C": "Rome", "answer": "B"},
    "as json": {"question": "q", "options": json.dumps(LIST), "answer": "1"},
    "in the text": {"question": TEXT, "answer": "B"},
    "in the text, bracketed": {"question": "q\n(A) Lima\n(B) Paris\n", "answer": "(B)"},
    "verl": {"prompt": [{"role": "user", "content": TEXT}], "reward_model": {"style": "rule", "ground_truth": "B"}},
    "nemotron": {"meta_data": {"question": TEXT}, "reward_model": {"style": "rule", "ground_truth": "B"}, "prompt": []},
    "roll": {"prompt": TEXT, "messages": "[]", "ground_truth": "B", "tag": "crossthinkqa"},
    "answer in a box": {"question": "q", "options": LIST, "answer": r"so \boxed{B}"},
    "letter and text": {"question": "q", "options": LIST, "answer": "B. Paris"},
    "whole float": {"question": "q", "options": LIST, "answer": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_rows_of_published_formats(row: dict) -> None:
    choice = made()
    instance = choice.parse(row)
    assert instance["answer"] == "B"
    assert instance["options"]["B"] == "Paris"
    assert list(instance["options"]) in (["A", "B", "C"], ["A", "B"])
    assert json.loads(json.dumps(instance)) == instance
    prompt = choice.prompt(instance)
    assert prompt.count("Paris") == 1  # options are listed once, wherever they stood
    assert "\\boxed{}" in prompt


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({"options": ["opa", "opb"], "answer": "cop", "first": 1}, {"question": "q", "opa": "x", "opb": "y", "cop": 2}),
        ({"options": "o.list", "question": "o.q", "answer": "o.a"}, {"o": {"list": ["x", "y"], "q": "q", "a": "y"}}),
        ({"answers": "index"}, {"question": "q", "options": ["1", "2", "3"], "answer": "1"}),
        ({"answers": "text"}, {"question": "q", "options": ["2", "1", "3"], "answer": "1"}),
        ({"answers": "text"}, {"question": "q", "options": ["B", "A"], "answer": "A"}),
        ({"question": "ctx"}, {"ctx": "q", "endings": ["x", "y"], "label": "1"}),
    ],
)
def test_columns_by_setting(settings: dict, row: dict) -> None:
    assert made(**settings).parse(row)["answer"] == "B"


@pytest.mark.parametrize(
    ("settings", "row", "said"),
    [
        ({}, {"text": "q"}, "question must be named, got None"),
        ({}, {"question": ["x"]}, "question must be text"),
        ({"question": "ask"}, {"question": "q"}, "question must be a column that is there, got 'ask'"),
        ({"options": "o"}, {"question": "q", "answer": "A"}, "options must be a column that is there, got 'o'"),
        ({}, {"question": "q", "options": ["x", "y"], "target": "A"}, "answer must be named, got None"),
        ({}, {"question": "q", "options": ["x"], "answer": "A"}, "options must be 2 to 26 texts"),
        ({}, {"question": "q", "options": [["x"], ["y"]], "answer": "A"}, "options must be 2 to 26 texts"),
        ({}, {"question": "q", "options": "x or y", "answer": "A"}, "options must be a list or a mapping"),
        ({}, {"question": "q", "options": ["x", "y"], "answer": "C"}, "answer must be an option, got 'C'"),
        ({}, {"question": "q", "options": ["x", "y"], "answer": 2}, "answer must be an option, got 2"),
        ({}, {"question": "q", "options": ["x", "y"], "answer": -1}, "answer must be an option"),
        ({}, {"question": "q", "options": ["x", "y"], "answer": {"a": 1}}, "answer must be an option"),
        ({"answers": "letter"}, {"question": "q", "options": ["x", "y"], "answer": 1}, "answer must be the letter of"),
        ({}, {"question": "q", "options": ["1", "2"], "answer": "1"}, "answers must be text or index"),
        ({"prompt": "{question}"}, {"question": "q", "options": ["x", "y"], "answer": 1}, "prompt must hold {options}"),
        ({"prompt": "rows"}, {"question": "q", "options": ["x", "y"], "answer": 1}, "prompt must be chat messages"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_say_why(settings: dict, row: dict, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said.replace("{", r"\{")):
        made(**settings).parse(row)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why is the sky blue?", "answer": "Because of scattering"},  # asks without options
        {"question": TEXT, "answer": "D"},  # whose answer is none of them
        {"question": "q", "options": ["x", "y"], "answer": None},
        {"question": "q", "options": ["x", "y"], "answer": ""},
        {"question": "q", "options": ["x", "y"], "answer": float("nan")},  # an empty cell of a table
    ],
)
def test_rows_that_are_dropped(row: dict) -> None:
    assert made().parse(row) is None


def test_the_last_list_of_a_question_holds_its_options() -> None:
    text = "Statements:\nA. All is well.\nB. Nothing is.\nWhich hold?\nA) both\nB) neither\nC) A. alone"
    assert listed_in(text) == {"A": "both", "B": "neither", "C": "A. alone"}
    assert listed_in("A. one alone") == {}
    assert listed_in("no list\nB. without\nC. its beginning") == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "hello"}, "prompt must be one of base, chat, rows, or hold {question}, got 'hello'"),
        ({"system": "be good"}, "system must be null where prompt is not chat, got 'be good'"),
        ({"options": ["a"]}, "options must be a column, or 2 to 26 columns"),
        ({"right_boxed": float("inf")}, "right_boxed must be a finite number"),
        ({"train": "rows.txt"}, "train must be a file"),
    ],
)
def test_settings_that_cannot_be(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said.replace("{", r"\{")):
        made(**settings)


def test_prompts() -> None:
    instance = QUESTION | {"question": "Is {options} a word?"}
    template = made(prompt="{question}|{options}|{question}").prompt(instance)
    assert template == "Is {options} a word?|A. Lima\nB. Paris\nC. Rome\nD. a dog|Is {options} a word?"
    system, user = made(prompt="chat", system="Be brief.").prompt(QUESTION)
    assert system == {"role": "system", "content": "Be brief."}
    assert user["role"] == "user"
    assert user["content"].startswith("Which city is on the Seine?\nA. Lima\nB. Paris\n")
    messages = [{"role": "user", "content": TEXT}]
    rows = made(prompt="rows")
    assert rows.prompt(rows.parse({"prompt": messages, "ground_truth": "B"})) == messages


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_splits_share_no_question_and_files_name_what_is_wrong(tmp_path, capsys) -> None:
    rows = [{"question": f"q{i}", "options": ["x", "y"], "answer": i % 2} for i in range(6)]
    again = {"question": "q0", "options": ["y", "x"], "answer": 0}  # other options: another question
    train = write(tmp_path / "train.jsonl", [*rows, again, {"question": "open?", "answer": "x"}])
    choice = made(train=train, test=write(tmp_path / "test.jsonl", rows[4:]))
    assert [one["question"] for one in choice.instances("train", None)] == ["q0", "q1", "q2", "q3", "q0"]
    assert choice.instances("train", 2) == choice.instances("train", None)[:2]
    assert "dropped rows" in capsys.readouterr().out
    broken = write(tmp_path / "broken.jsonl", [*rows, {"question": "q", "options": ["x", "y"], "answer": "Z"}])
    with pytest.raises(ValueError, match=r"broken\.jsonl, row 7: answer must be an option, got 'Z'"):
        made(train=broken).instances("train", None)


def test_the_stand_in_keeps_the_settings() -> None:
    given = {"question": "meta.q", "answers": "index", "first": 1, "train_size": 9000}
    files = {"train": "hf://datasets/o/n/t.jsonl", "test": {"one": "a.jsonl", "two": "b.jsonl"}}
    real = made(**files, **given, wrong_unboxed=-2.0, prompt="rows")
    stand_in = real.stand_in()
    assert stand_in.settings.wrong_unboxed == -2.0
    parts = {split: stand_in.instances(split, None) for split in ("train", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 16, "test": 16}
    assert {one["set"] for one in parts["test"]} == {"one", "two"}
    assert len({one["answer"] for one in parts["train"]}) == 5
    assert not {one["question"] for one in parts["train"]} & {one["question"] for one in parts["test"]}
    assert all(stand_in.prompt(one)[-1]["content"].startswith(one["question"]) for one in parts["train"])
    with pytest.raises(ValueError, match="validation must be a file"):
        stand_in.instances("validation", None)


def test_it_is_found_by_name_and_errors_name_the_key() -> None:
    assert task.find("multiple_choice") is MultipleChoice
    assert set(made().rewards) == {"correctness", "crossthink", "format"}
    with pytest.raises(RecipeError, match=r"there is no such file"):
        task.instances_of(made(test="nowhere.jsonl"), "test", 3)
