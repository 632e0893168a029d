"""Where answers stand: in responses, and in the rows of published data sets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What an answer may have to be judged. Those of the published sets have at most 204 characters, nested 4 deep.
LONGEST = 2000  # characters
DEEPEST = 20  # brackets in one another: math-verify takes seconds for ten more

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s{}$\\]+")

QUESTIONS = ("question", "problem", "prompt")
# The first row of columns of which one is there holds the answer; worked solutions hold it too, if nothing else does
ANSWERS = (("answer", "final_answer", "reward_model.ground_truth", "expected_answer", "ground_truth"), ("solution",))

# What verl's rows (examples/data_preprocess), DAPO-Math-17k and other published rows write around a question
_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.",
)
_AFTER = (
    "Let's think step by step and output the final answer within \\boxed{}.",
    'Let\'s think step by step and output the final answer after "####".',
    'Remember to put your answer on its own line after "Answer:".',
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Please output the final answer within \\boxed{}.",
)


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of a text holds, as MATH's graders read it; None where there is none that ends.

    An earlier one never counts, so a list of boxed guesses is judged by its last.
    """
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    found = _BOX.match(text, at) if at >= 0 else None
    if not found:
        return None
    start = found.end()
    if text[start : start + 1] != "{":
        bare = _BARE.match(text, start, start + LONGEST)
        return bare[0] if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start, start + LONGEST + 2):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth and brace[0] == "}":
            return text[start + 1 : brace.start()].strip()
    return None


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
    """An answer without the dollar signs of its formulas and without white space around it."""
    return re.sub(r"(?<!\\)\$", "", answer).strip()


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


def bare(question: str) -> str:
    """A question without the known instructions that published rows write around it."""
    question, before = question.strip(), ""
    while question != before:
        before = question
        for words in _BEFORE:
            question = question.removeprefix(words).strip()
        for words in _AFTER:
            question = question.removesuffix(words).strip()
    return question


def at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a dotted name reaches into mappings. None where it is not there."""
    if name in row:
        return row[name]
    head, dot, tail = name.partition(".")
    inner = row.get(head)
    return at(inner, tail) if dot and isinstance(inner, Mapping) else None


def columns(row: Mapping[str, Any]) -> str:
    """The columns of a row by name, those of mappings dotted."""
    names = [f"{name}.{n}" if n else name for name in row for n in (row[name] if _is_map(row[name]) else [""])]
    return ", ".join(map(str, names))


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def pick(row: Mapping[str, Any], key: str, chosen: str | None, known: Sequence[str], same: Callable[[Any], Any]) -> Any:
    """The value of the column that the setting `key` names, or of the one of `known` that the row has.

    Args:
        same: several columns of `known` are one if this is equal for all.

    Raises:
        ValueError: where the column is not there, or several are and differ.
    """
    if chosen is not None:
        if (value := at(row, chosen)) is None:
            raise ValueError(f"{key} must be a column that is there, got {chosen!r}: there are {columns(row)}")
        return value
    there = {name: value for name in known if (value := at(row, name)) is not None}
    if not there:
        raise ValueError(
            f"{key} must be named, got None: none of the columns {columns(row)} is one of {', '.join(known)}"
        )
    values = iter(there.values())
    first = next(values)
    if len(there) > 1 and any(same(value) != same(first) for value in values):
        raise ValueError(f"{key} must be named, got None: the columns {', '.join(there)} differ")
    return first
