"""The tiny model's language: traces that hold what they promise, their analysis, and the tokenizer."""

import random

import pytest

from training.tasks.countdown.instances import split
from training.tasks.countdown.prompts import tiny_prompt
from training.tasks.countdown.trace import MAX_TOKENS, Style, analyse, draw_style, write_trace
from training.warmstart import build_tokenizer


@pytest.fixture(scope="module")
def traces() -> list[tuple[dict, str]]:
    rng = random.Random(0)
    instances = split("train", 400, (3, 4), level="tiny")
    return [(i, write_trace(i["numbers"], i["target"], draw_style(rng), rng)) for i in instances]


def test_written_traces_are_true_and_end_in_an_answer(traces: list[tuple[dict, str]]) -> None:
    for instance, text in traces:
        report = analyse(text, **instance)
        assert report.right_arithmetic == report.equations
        assert report.right_verdicts == report.verdicts
        assert report.answered
        assert report.gave_up != report.correct
        assert len(text.split()) < MAX_TOKENS
    solved = sum(analyse(text, **instance).correct for instance, text in traces)
    assert 120 < solved < 320  # the mixture holds good and bad searches


def test_aim_and_insight_make_a_search_better() -> None:
    instances = split("train", 300, 4, level="tiny")

    def solved(style: Style) -> int:
        rng = random.Random(1)
        return sum(analyse(write_trace(**i, style=style, rng=rng), **i).correct for i in instances)

    aimless = solved(Style(aim=0.0, insight=0.0, budget=MAX_TOKENS))
    aimed = solved(Style(aim=1.0, insight=0.0, budget=MAX_TOKENS))
    assert aimless + 20 < aimed < solved(Style(aim=1.0, insight=0.5, budget=MAX_TOKENS)) - 20


def test_analysis_by_hand() -> None:
    text = "7 - 2 = 5 , 5 + 11 = 16 hi 5 * 11 = 54 lo 11 - 7 = 4 , 4 + 2 = 6 ok answer ( 11 - 7 ) + 2"
    report = analyse(text, [2, 11, 7], 6)
    assert (report.equations, report.right_arithmetic) == (5, 4)
    assert (report.verdicts, report.right_verdicts) == (3, 2)
    assert (report.answered, report.gave_up, report.correct) == (True, False, True)


@pytest.mark.parametrize(
    ("text", "answered", "gave_up"),
    [
        ("2 + 7 = 9 , 9 + 11 = 20 hi answer none", True, True),
        ("2 + 7 = 9 , 9 + 11 = 20 hi answer ( 2 + 7 ) + 11", True, False),  # wrong, but an answer
        ("2 + 7 = 9 , 9 + 11 = 20 hi answer ( 2 + 7 ) +", False, False),  # cut off
        ("2 + 7 = 9 , 9 + 11 = 20 hi answer 2 + 7", False, False),  # a number is missing
        ("2 + 7 = 9 , 9 +", False, False),
        ("", False, False),
    ],
)
def test_what_counts_as_answered(text: str, answered: bool, gave_up: bool) -> None:
    report = analyse(text, [2, 11, 7], 6)
    assert (report.answered, report.gave_up, report.correct) == (answered, gave_up, False)


def test_division_by_zero_and_nonsense_equations_are_wrong_arithmetic() -> None:
    report = analyse("5 / 0 = 0 , 7 / 2 = 3 lo 8 / 4 = 2 lo 3 - 5 = 2 , = 4 + 4", [1], 9)
    assert (report.equations, report.right_arithmetic, report.verdicts) == (4, 1, 2)


def test_tokenizer_round_trip(traces: list[tuple[dict, str]]) -> None:
    tokenizer = build_tokenizer()
    for instance, text in traces:
        full = f"{tiny_prompt(**instance)} {text}"
        ids = tokenizer(full)["input_ids"]
        assert len(ids) == len(full.split())  # one token a word, nothing added
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == full
    padded = tokenizer(["make 6 from 2 11 7 :", "use 2 , 11 , 7 to make 6 :"], padding=True)
    assert padded["attention_mask"][0] == [0, 0, 0] + [1] * 7  # on the left
