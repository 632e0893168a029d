"""The Countdown task: verifier (hand cases, hostile input, fuzz), splits, solver, prompts."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.questions import training_questions
from training.tasks.countdown import Countdown
from training.tasks.countdown.instances import LEVELS, split, split_of
from training.tasks.countdown.prompts import base_prompt, chat_prompt, tiny_prompt
from training.tasks.countdown.solver import reachable
from training.tasks.countdown.verify import extract_answer, parse_expression, score

# Changing an instance changes every published figure: do it on purpose only.
PINNED = {
    "paper": [
        {"numbers": [38, 38, 42, 82], "target": 36},
        {"numbers": [59, 53, 77, 69], "target": 14},
        {"numbers": [71, 71, 5, 68], "target": 73},
    ],
    "tiny": [
        {"numbers": [9, 11, 11], "target": 31},
        {"numbers": [8, 6, 1, 6], "target": 55},
        {"numbers": [4, 6, 6], "target": 8},
        {"numbers": [8, 5, 1, 8], "target": 21},
    ],
    "splits": ["validation", "train", "train", "train", "train", "test", "test", "train"],
}


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "expected"),
    [
        ("8/(3-8/3)", [8, 3, 8, 3], 24, 1.0),  # fractional intermediates
        ("(1-5)*(2-8)", [1, 5, 2, 8], 24, 1.0),  # negative intermediates
        ("-4 + 2*14", [4, 2, 14], 24, 1.0),  # unary minus
        ("3 - -4 - 2", [2, 3, 4], 5, 1.0),
        ("10-4-3", [3, 4, 10], 3, 1.0),  # left to right
        ("24/4/3", [24, 4, 3], 2, 1.0),
        ("2+3*4", [2, 3, 4], 14, 1.0),  # precedence
        ("2*3+4", [2, 3, 4], 10, 1.0),
        (" ( 11 - 7 )\n+ 2 ", [2, 11, 7], 6, 1.0),
        ("((((5))))", [5], 5, 1.0),
        ("1+2+3", [1, 2, 3], 7, 0.1),  # well-formed, another value
        ("8/3*3", [8, 3, 3], 9, 0.1),
        ("1/3", [1, 3], 0, 0.1),  # not rounded to the target
        ("3*8", [3, 8, 1], 24, 0.0),  # a number is missing
        ("3*8*1*1", [3, 8, 1], 24, 0.0),  # a number is used twice
        ("12*2", [1, 2, 2], 24, 0.0),  # digits are not glued
        ("(1+2)*8 = 24", [1, 2, 8], 24, 0.0),  # an equation is not an expression
        ("2**3", [2, 3], 8, 0.0),
        ("9//2", [9, 2], 4, 0.0),
        ("9**9**9", [9, 9, 9], 1, 0.0),
        ("1/0", [1, 0], 1, 0.0),
        ("5/(3-3)", [5, 3, 3], 1, 0.0),
        ("1.5+2", [1, 5, 2], 3, 0.0),
        ("08+1", [8, 1], 9, 0.0),
        ("-(1+2)", [1, 2], -3, 0.0),  # unary minus stands before an integer only
        ("--3", [3], 3, 0.0),
        ("+3", [3], 3, 0.0),
        ("2(3)", [2, 3], 6, 0.0),
        ("(1+2", [1, 2], 3, 0.0),
        ("1+2)", [1, 2], 3, 0.0),
        ("()", [], 0, 0.0),
        ("", [], 0, 0.0),
        ("1+", [1], 1, 0.0),
        ("1 2", [1, 2], 12, 0.0),
        ("٣+٤", [3, 4], 7, 0.0),  # digits of other scripts
        ("3\u00d74", [3, 4], 12, 0.0),
        ("²+1", [2, 1], 3, 0.0),
        ("1_0+2", [10, 2], 12, 0.0),
        ("__import__('os').getpid()", [1], 1, 0.0),
        ("9" * 10_000, [9], 9, 0.0),
    ],
)
def test_score_by_hand(answer: str, numbers: list[int], target: int, expected: float) -> None:
    assert score(f"<think>hm</think> <answer>{answer}</answer>", numbers, target) == expected
    assert score(f"some search answer {answer}", numbers, target) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>1</answer> then <answer>2</answer> end", "2"),
        ("<answer>1</answer> then <answer>2", "1"),  # the last complete block
        ("<answer>1</answer> </answer>", "1"),
        ("<answer> 3 + 4 </answer>", "3 + 4"),
        ("answer 1 answer ( 2 + 3 )", "( 2 + 3 )"),
        ("the Answer: 7", "7"),
        ("answers 7", None),
        ("answer none", "none"),
        ("no such word", None),
        ("<answer>" + "1" * 1000 + "</answer>", None),
        ("answer 5" + " " * 400, "5"),
    ],
)
def test_which_answer_is_read(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" + "(" * 10_000 + "1" + ")" * 10_000 + "</answer>",
        "answer " + "(" * 10_000,
        "<answer>" + "(" * 1_000_000 + "</answer>",
        "</answer" * 125_000,
        "<answer>" * 125_000,
        "xanswer" * 140_000,
        "answer " * 140_000,
        "<answer>" + "-" * 200 + "1</answer>",
        "<answer>" + "1/" * 120 + "1</answer>",
        "<answer>9**9**9</answer>" * 40_000,
        " " * 1_000_000 + "answer",
        "answer" + " " * 1_000_000,
    ],
)
def test_hostile_text_costs_milliseconds(text: str) -> None:
    best = float("inf")
    for _ in range(3):  # the best of three: other processes must not fail the test
        begin = time.perf_counter()
        assert score(text, [9, 9, 9], 1) == 0.0
        best = min(best, time.perf_counter() - begin)
    assert best < 5e-3


@pytest.mark.parametrize("completion", [None, 3, b"answer 3", ["answer 3"], object()])
def test_a_completion_that_is_no_text_scores_zero(completion: object) -> None:
    assert score(completion, [3], 3) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [None, 3, ["3"], [3.0], [None], [3] * 1000])
def test_numbers_that_are_no_integers_score_zero(numbers: object) -> None:
    assert score("answer 3", numbers, 3) == 0.0  # type: ignore[arg-type]


def test_a_target_that_is_no_integer_scores_zero() -> None:
    assert score("answer 3", [3], float("nan")) == 0.0  # type: ignore[arg-type]


_ANSWER_LIKE = st.text(alphabet="0123456789+-*/() .=e_answer<>", max_size=300)


@settings(max_examples=400, deadline=200)
@given(
    text=st.one_of(st.text(), _ANSWER_LIKE, _ANSWER_LIKE.map("<answer>{}</answer>".format)),
    numbers=st.lists(st.integers(), max_size=6),
    target=st.integers(),
)
def test_fuzz_never_raises(text: str, numbers: list[int], target: int) -> None:
    assert score(text, numbers, target) in (0.0, 0.1, 1.0)


_EXPRESSION = st.recursive(
    st.integers(1, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=8,
)


@settings(max_examples=300, deadline=200)
@given(_EXPRESSION)
def test_fuzz_values_agree_with_python(text: str) -> None:
    parsed = parse_expression(text)
    assert parsed is not None
    # Only the test may use eval: the text comes from the strategy above.
    assert parsed[0] == Fraction(eval(text))


@settings(max_examples=200, deadline=200)
@given(st.text(alphabet="0123456789+-*/() ", max_size=20))
def test_fuzz_what_parses_is_python(text: str) -> None:
    parsed = parse_expression(text)
    if parsed is not None:
        assert float(parsed[0]) == pytest.approx(eval(text.strip(), {"__builtins__": {}}))


def test_rewards_as_trl_calls_them() -> None:
    """Completions as text or as chat messages, the number of the instance by name, other columns passed along."""
    task = Countdown(Countdown.Settings("countdown", train_size=3))
    names = ["score", "correctness", "format", "answered"]
    columns, rewards = training_questions(task, names)
    assert columns == {"prompt": [task.prompt(i) for i in task.instances("train", 3)], "instance": [0, 1, 2]}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>3 + 8 + 9</answer>"}]
    answers = ["answer 3 * 9 + 8", "answer 3 * 9 + 8", chat, "answer none", ""]  # instance 2: make 35 from 3, 8, 9
    found = [f(completions=answers, instance=[2, 0, 2, 2, 0], prompts=None) for f in rewards]
    assert found == [
        [1.0, 0.0, 0.1, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0, 0.0],
        [0.2, 0.0, 0.2, 0.2, 0.0],
    ]
    assert [f.__name__ for f in rewards] == names


def test_reachable_by_hand() -> None:
    assert reachable([2, 3]) == {1, 5, 6}
    assert reachable([2, 4]) == {2, 6, 8}
    assert 24 in reachable([3, 3, 8, 8])  # 8 / (3 - 8 / 3)
    assert 24 not in reachable([3, 3, 8, 8], limit=98)  # which needs a fraction
    assert reachable([5], limit=98) == {5}
    assert 24 not in reachable([1, 1, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        reachable([0, 1])


@pytest.mark.parametrize("level", ["paper", "tiny"])
@pytest.mark.parametrize("count", [3, 4])
def test_splits_are_disjoint_solvable_and_in_range(level: str, count: int) -> None:
    train_size = 2_000 if (level, count) == ("tiny", 3) else 20_000
    sizes = {"train": train_size, "validation": 400, "test": 512}
    parts = {name: split(name, n, count, level=level) for name, n in sizes.items()}
    multisets = {name: {tuple(sorted(i["numbers"])) for i in part} for name, part in parts.items()}
    assert not multisets["train"] & multisets["test"]
    assert not multisets["train"] & multisets["validation"]
    assert not multisets["validation"] & multisets["test"]
    ranges = LEVELS[level]
    for name, part in parts.items():
        assert len(part) == sizes[name]
        assert len({(tuple(sorted(i["numbers"])), i["target"]) for i in part}) == len(part)
        assert all(len(i["numbers"]) == count and split_of(i["numbers"]) == name for i in part)
        assert all(1 <= number <= ranges.max_number for i in part for number in i["numbers"])
        assert all(1 <= i["target"] <= ranges.max_target and i["target"] not in i["numbers"] for i in part)
        assert all(i["target"] in reachable(i["numbers"], ranges.limit) for i in part[:100])


def test_splits_are_pinned() -> None:
    assert split("test", 3, 4) == PINNED["paper"]
    assert split("test", 4, (3, 4), level="tiny") == PINNED["tiny"]
    assert [split_of([i, 2 * i, 7]) for i in range(1, 9)] == PINNED["splits"]


def test_a_longer_split_begins_with_the_shorter() -> None:
    for counts in (3, 4, (3, 4)):
        assert split("test", 50, counts)[:20] == split("test", 20, counts)
    assert split("train", 20, 4, seed=1) != split("train", 20, 4)


def test_order_of_numbers_does_not_change_the_split() -> None:
    assert all(split_of([a, 7, 90]) == split_of([90, a, 7]) for a in range(1, 50))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("dev", 5), "name"),
        (("train", -1), "non-negative"),
        (("train", 1.5), "non-negative"),
        (("train", 5, 7), "between 2 and 6"),
        (("train", 5, []), "between 2 and 6"),
        (("train", 5, (3, 3)), "distinct"),
    ],
)
def test_bad_arguments_raise(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        split(*arguments)
    with pytest.raises(ValueError, match="level"):
        split("train", 5, level="huge")


def test_a_pool_that_is_too_small_says_so() -> None:
    with pytest.raises(ValueError, match="were asked for"):
        split("test", 5_000, 3, level="tiny")
    with pytest.raises(ValueError, match="were asked for"):
        split("test", 100_000, 2)


def test_prompts() -> None:
    base = base_prompt([3, 8, 8, 3], 24)
    assert "3, 8, 8, 3" in base
    assert "24" in base
    assert base.endswith("<think>")
    (message,) = chat_prompt([3, 8, 8, 3], 24)
    assert message["role"] == "user"
    assert message["content"] in base
    prompts = {tiny_prompt(i["numbers"], i["target"]) for i in split("train", 60, (3, 4), level="tiny")}
    assert {len(prompt.split()) for prompt in prompts} == {7, 8, 10, 12}  # so batches are really padded


RAW = [{"nums": [44, 19, 35], "target": 98}, {"nums": [63, 95, 96], "target": 64}, {"nums": [1, 2, 3, 4], "target": 24}]
VERL = [
    {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": f"make {row['target']}"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": row["target"], "numbers": row["nums"]}},
    }
    for row in RAW
]


def countdown_on(folder, rows: list[dict], **settings) -> Countdown:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Countdown(Countdown.Settings("countdown", **{"train": str(path), "prompt": "base"} | settings))


@pytest.mark.parametrize("rows", [RAW, VERL])
def test_rows_of_tinyzero(tmp_path, rows: list[dict]) -> None:
    task = countdown_on(tmp_path, rows, test=str(tmp_path / "rows.jsonl"))
    assert sorted(i["target"] for i in task.instances("test", None)) == [24, 64, 98]
    assert task.prompt(task.instances("test", 3)[0]).startswith("What follows is a dialogue.")
    with pytest.raises(ValueError, match=r"train must hold .*, got .*rows: 3 that test asks too"):
        task.instances("train", None)
    four = countdown_on(tmp_path, rows, test=str(tmp_path / "rows.jsonl"), numbers=[4])
    assert four.instances("test", None) == [{"numbers": [1, 2, 3, 4], "target": 24}]
    with pytest.raises(ValueError, match="test must have 2 puzzles of 4 numbers, got 1"):
        four.instances("test", 2)


def test_one_file_is_divided_by_its_numbers(tmp_path) -> None:
    rows = [{"nums": [a, b, c], "target": a + b * c} for a in range(1, 9) for b in range(1, 9) for c in range(1, 9)]
    task = countdown_on(tmp_path, rows)
    parts = {name: task.instances(name, None) for name in ("train", "validation", "test")}
    multisets = [{tuple(sorted(i["numbers"])) for i in part} for part in parts.values()]
    assert all(parts.values()) and not (multisets[0] & multisets[1] | multisets[0] & multisets[2])
    assert all(split_of(i["numbers"]) == name for name, part in parts.items() for i in part)
    assert task.instances("test", 2) == parts["test"][:2]


def test_prompts_of_rows(tmp_path) -> None:
    task = countdown_on(tmp_path, VERL, prompt="rows")
    instance = task.instances(split_of([44, 19, 35]), 1)[0]
    assert task.prompt(instance) == [{"role": "user", "content": f"make {instance['target']}"}]
    right = task.rewards["correctness"](["<answer>44 + 19 + 35</answer>"], [{"numbers": [44, 19, 35], "target": 98}])
    assert right == [1.0]
    with pytest.raises(ValueError, match=r"row 1: it must have chat messages as prompt, got None"):
        countdown_on(tmp_path, RAW, prompt="rows").instances("train", 1)
    with pytest.raises(ValueError, match="row 1: it must have whole numbers nums"):
        countdown_on(tmp_path, [{"nums": "1 2", "target": 3}]).instances("train", 1)
    with pytest.raises(ValueError, match="prompt must be one of tiny, base, chat without files, got 'rows'"):
        Countdown.Settings("countdown", prompt="rows")
