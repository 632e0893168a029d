r"""Which option a response chooses: the rule of ROLL's reward for CrossThink-QA (alibaba/ROLL), made strict.

There the last `\boxed{...}` counts, else the text after the last "answer is", else the whole response, and the first
capital letter of it is the answer. Here the letter must stand alone, so `\boxed{Paris}` does not choose P; a
small one counts before punctuation or the end, as in `(b)`; and a response with neither box nor "answer is" has none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ..maths.answers import boxed

_THOUGHT = "</think>"
_MARK = re.compile(r"answer\s+is", re.IGNORECASE)
_READ = 400  # characters of an answer that are read
_COMMAND = re.compile(r"\\[A-Za-z]+")  # of LaTeX, as in \text{B}
_ALONE = re.compile(r"\W*(?:(?:option|choice|letter)\W+)?([A-Za-z])(?:\s*[.):\]},;*]|\W*$)", re.IGNORECASE)
_CAPITAL = re.compile(r"(?<!\w)(?<!\w['\u2019-])([A-Z])(?!['\u2019-]?\w)")


def spoken(response: str) -> tuple[str | None, bool]:
    r"""The text that answers, and whether it is boxed; (None, False) where nothing does.

    Only what follows the last `</think>` is read. The text is what the last `\boxed{...}` holds, else the beginning of
    what follows the last "answer is".
    """
    response = response[response.rfind(_THOUGHT) + len(_THOUGHT) :] if _THOUGHT in response else response
    if (box := boxed(response)) is not None:
        return box[:_READ], True
    marks = list(_MARK.finditer(response))
    return (response[marks[-1].end() :][:_READ], False) if marks else (None, False)


def chosen(text: str | None, options: Mapping[str, str], texts: bool = False) -> str | None:
    """The letter of the option that a text names; None where it names none.

    Args:
        options: texts by letter.
        texts: whether the text of an option stands for its letter.
    """
    if text is None:
        return None
    if texts and (letter := by_text(text, options) or by_text(text.partition("\n")[0], options)):
        return letter
    bare = _COMMAND.sub(" ", text)
    found = _ALONE.match(bare) or _CAPITAL.search(bare)
    letter = found[1].upper() if found else ""
    return letter if letter in options else None


def by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that has this text, case and white space aside."""
    letters = [letter for letter, option in options.items() if _plain(option) == _plain(text)]
    return letters[0] if len(letters) == 1 else None


def _plain(text: str) -> str:
    return " ".join(_COMMAND.sub(" ", text).casefold().strip(" \t\n.{}$").split())


def is_letter(text: str, letters: Collection[str]) -> str | None:
    """The letter that a text is, brackets and a dot aside; None where it is none of `letters`."""
    found = re.fullmatch(r"\W*([A-Za-z])\W*", _COMMAND.sub(" ", text))
    return found[1].upper() if found and found[1].upper() in letters else None
