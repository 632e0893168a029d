"""How published rows and responses are written: boxes, columns, and the instructions around questions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 2000  # characters that an answer may have; those of the published sets have at most 204

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s{}$\\]+")

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


def messages(value: Any) -> list[dict[str, str]]:
    """Chat messages as verl's rows have them, in the column `prompt`.

    Raises:
        ValueError: where it is something else.
    """
    fits = isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)
    found = [{key: one.get(key) for key in ("role", "content")} for one in value] if fits else []
    if not found or not all(isinstance(text, str) for one in found for text in one.values()):
        raise ValueError(f"prompt must be chat messages of role and content, got {str(value)[:80]!r}")
    return found


def at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a dotted name reaches into mappings. None where it is not there, or empty."""
    if name in row:
        value = row[name]
        return None if isinstance(value, float) and math.isnan(value) else value  # how tables write an empty cell
    head, dot, tail = name.partition(".")
    inner = row.get(head)
    return at(inner, tail) if dot and isinstance(inner, Mapping) else None


def columns(row: Mapping[str, Any]) -> str:
    """The columns of a row by name, those of mappings dotted."""
    names = [f"{name}.{n}" if n else name for name in row for n in (row[name] if _is_map(row[name]) else [""])]
    return ", ".join(map(str, names))


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def pick(
    row: Mapping[str, Any],
    key: str,
    chosen: str | None,
    known: Sequence[str],
    same: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the column that the setting `key` names, or of the first of `known` that has one; None for no value.

    Args:
        same: this must be equal for all of `known` that have a value.

    Raises:
        ValueError: where the column is not there, or several are and differ.
    """
    names = known if chosen is None else [chosen]
    there = {name: value for name in names if (value := at(row, name)) is not None}
    if not there and not any(name in row or name.partition(".")[0] in row for name in names):
        if chosen is not None:
            raise ValueError(f"{key} must be a column that is there, got {chosen!r}: there are {columns(row)}")
        raise ValueError(
            f"{key} must be named, got None: none of the columns {columns(row)} is one of {', '.join(known)}"
        )
    values = list(there.values())
    if same is not None and any(same(value) != same(values[0]) for value in values[1:]):
        raise ValueError(f"{key} must be named, got None: the columns {', '.join(there)} differ")
    return values[0] if values else None
