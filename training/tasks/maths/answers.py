"""Which answers are right: what the rows of published data sets say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ...published import LONGEST, boxed

# Brackets in one another that an answer may have: math-verify takes seconds for ten more. Published ones reach 4.
DEEPEST = 20
QUESTIONS = ("question", "problem", "prompt")
# The first row of columns of which one is there holds the answer; worked solutions hold it too, if nothing else does
ANSWERS = (("answer", "final_answer", "reward_model.ground_truth", "expected_answer", "ground_truth"), ("solution",))


def marked(text: str) -> str | None:
    """What follows the last `####` of a text in its line, as GSM8K marks answers; None where there is none."""
    _, mark, rest = text.rpartition("####")
    answer = rest.strip().partition("\n")[0][:LONGEST] if mark else ""
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer) or None


def depth(text: str) -> int:
    """How many brackets of any kind are open at once, at most."""
    now = most = 0
    for character in text:
        now = now + 1 if character in "([{" else max(0, now - (character in ")]}"))
        most = max(most, now)
    return most


def plain(answer: str) -> str:
    """An answer without the dollar signs of its formulas, the full stop after it, and white space around it."""
    return re.sub(r"(?<!\\right)(?<!\.)\.$", "", re.sub(r"(?<!\\)\$", "", answer).strip())


def gold(value: Any) -> list[str]:
    r"""The right answers that a row's value holds: a number, text, or a list of them, any of which is right.

    Of text, what follows the last `####` (GSM8K) or stands in the last `\boxed{...}` (MATH, Minerva), else all of it;
    nothing of empty text.

    Raises:
        ValueError: for another kind of value, or text too long to be an answer alone.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(dict.fromkeys(one for item in value for one in gold(item)))
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, text or a list of them, got {type(value).__name__}")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    text = str(value)
    inside = marked(text) or boxed(text)
    text = plain(text if inside is None else inside)
    if len(text) > LONGEST:
        raise ValueError(f"must hold an answer after #### or in \\boxed{{...}}, or be one, got {str(value)[:80]!r}")
    return [text] if text else []
