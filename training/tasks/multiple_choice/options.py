"""What a row of a published data set asks: its question, its options by letter, and the letter of the right one."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ...published import at, bare, boxed, pick
from .letters import by_text, is_letter

LETTERS = string.ascii_uppercase
QUESTIONS = ("question", "Question", "question_stem", "query", "problem", "input", "meta_data.question", "prompt")
OPTIONS = ("options", "choices", "endings", "extra_info.options", "extra_info.choices")
ANSWERS = (
    *("answer", "answerKey", "correct_answer", "expected_answer", "ground_truth", "reward_model.ground_truth"),
    *("answer_index", "answer_idx", "label", "gold"),
)
_LISTED = re.compile(r"^[ \t]*[(\[]?([A-Z])[.):\]]+[ \t]*(\S.*?)?[ \t]*$", re.MULTILINE)


def question_of(value: Any) -> str:
    """The text of a question: text, or chat messages, of which the last asks; `bare` of known instructions."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str) or not (text := bare(value)):
        raise ValueError(f"question must be text, or chat messages, got {_short(value)}")
    return text


def options_of(row: Mapping[str, Any], wanted: str | list[str] | None) -> tuple[dict[str, str], list[str]] | None:
    """The options of a row by letter, and the row's own labels for them; None where no column has them.

    They stand in one column, as a list, as a mapping of label to text, as lists `text` and `label` (ARC), or as a list
    of mappings of one label each; or in several columns, a text in each, such as A, B, C and D.
    """
    if isinstance(wanted, list):
        pairs = [(name, pick(row, "options", name, ())) for name in wanted]
    else:
        found = (value for name in OPTIONS if (value := at(row, name)) is not None)
        value = next(found, None) if wanted is None else pick(row, "options", wanted, ())
        if isinstance(value, str):
            value = _decoded(value)
        if value is None:
            there = [letter for letter in LETTERS if row.get(letter) is not None]
            pairs = [(letter, row[letter]) for letter in there]
            if there != list(LETTERS[: len(there)]) or len(there) < 2:
                return None
        else:
            pairs = _pairs(value)
    pairs = [(str(label).strip(), text) for label, text in pairs if text is not None]
    if not 2 <= len(pairs) <= len(LETTERS) or not all(isinstance(text, str | int | float) for _, text in pairs):
        raise ValueError(f"options must be 2 to {len(LETTERS)} texts, got {_short([text for _, text in pairs])}")
    return {letter: str(text).strip() for letter, (_, text) in zip(LETTERS, pairs)}, [label for label, _ in pairs]


def listed_in(question: str) -> dict[str, str]:
    """The options that a question lists itself, a line each, from A on: the last such list; empty without one."""
    run: dict[str, str] = {}
    for found in _LISTED.finditer(question):
        letter, text = found[1], found[2] or ""
        if letter == "A":
            run = {}
        if letter == LETTERS[len(run)]:
            run[letter] = text
    return run if len(run) >= 2 else {}


def answer_of(value: Any, options: Mapping[str, str], labels: Sequence[str], kind: str, first: int) -> str | None:
    """The letter of the right option; None where the row has no answer.

    Args:
        value: what stands in the row.
        labels: what the row calls the options.
        kind: what the value is: `letter`, `index`, `text`, or `any` of these.
        first: the index of the first option.

    Raises:
        ValueError: where it is none of the options, or `any` leaves open which.
    """
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    ways: dict[str, str | None] = {}
    if isinstance(value, int | float) and not isinstance(value, bool):
        ways["letter"] = LETTERS[labels.index(str(value))] if str(value) in labels else None
        ways["index"] = _at(value, first, options)
    elif isinstance(value, str):
        text = (inside if (inside := boxed(value)) is not None else value).strip()
        if text in labels:
            ways["letter"] = LETTERS[labels.index(text)]
        else:
            ways["letter"] = is_letter(text, options)
        ways["text"] = by_text(text, options) or _listed(text, options)
        ways["index"] = (
            _at(int(text), first, options) if re.fullmatch(r"\d{1,3}", text) and text not in labels else None
        )
    found = {way: letter for way, letter in ways.items() if letter and kind in ("any", way)}
    if not found:
        what = "an option" if kind == "any" else f"the {kind} of an option"
        raise ValueError(f"answer must be {what}, got {_short(value)}: the options are {_short(options)}")
    if "letter" not in found and len(set(found.values())) > 1:
        raise ValueError(
            f"answers must be {' or '.join(found)}, got 'any': {_short(value)} is both of {_short(options)}"
        )
    return next(iter(found.values()))


def _at(index: int | float, first: int, options: Mapping[str, str]) -> str | None:
    places: dict[float, str] = dict(enumerate(options, first))
    return places.get(index)  # 1.0 is the key 1


def _listed(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of a text such as `B. Paris`."""
    found = _LISTED.fullmatch(text)
    return found[1] if found and found[2] and found[1] in options and by_text(found[2], options) == found[1] else None


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts, labels = value["text"], value.get("label") or value.get("labels") or []
        return list(zip(labels, texts)) if len(labels) == len(texts) else list(zip(LETTERS, texts))
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        if all("text" in one for one in value):
            return [(one.get("label", letter), one["text"]) for letter, one in zip(LETTERS, value)]
        # parquet gives every mapping of a list all keys
        one_each = [[(k, v) for k, v in one.items() if v is not None] for one in value]
        return [pair[0] for pair in one_each if len(pair) == 1]
    return list(zip(LETTERS + LETTERS.lower(), value)) if isinstance(value, list) else []


def _decoded(value: str) -> Any:
    """A list or mapping that a column of text holds as JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"options must be a list or a mapping, got {_short(value)}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
