r"""Questions with lettered options, from files; judged by the rule of CrossThink-QA.

The rule is the reward `crossthink`: that of ROLL, the library the paper trains with, for this data set (`reward_type:
soft`, without its terms for repetition and length). A recipe that follows the paper sets `grpo.rewards: [crossthink]`.
`letters.py` says which option a response chooses.

CrossThink-QA has its options inside its questions, in verl's columns or ROLL's; its rows that ask without options are
dropped. MMLU, MMLU-Pro, ARC, CommonsenseQA, OpenBookQA and MedQA are read as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from ...published import messages, pick
from ...rows import FileSettings, FileTask
from ...task import CORRECTNESS, Figure, Instance, Prompt, Reward, one_by_one
from .letters import chosen, spoken
from .options import ANSWERS, LETTERS, QUESTIONS, answer_of, listed_in, options_of, question_of

_ASK = "Reason step by step, and put the letter of the right option within \\boxed{}."
_PROMPTS = {
    "base": f"Question: {{question}}\n{{options}}\n{_ASK}\nReasoning:",
    "chat": f"{{question}}\n{{options}}\n\n{_ASK}",
}
_ROWS = "rows"
_FIXTURE = Path(__file__).with_name("fixture")


class MultipleChoice(FileTask):
    """Questions of which one option is right, such as those of CrossThink-QA, MMLU, MMLU-Pro and ARC."""

    @dataclass
    class Settings(FileSettings):
        r"""Which questions, how they are asked, and what responses earn.

        Attributes:
            question: the column of the question; dotted to reach into mappings. None: the known one that is there.
            options: the column of the options, or a list of columns, one an option. None: the known one that is there;
                without one, the options stand in the question, a line each that begins as in `A.` or `(A)`.
            answer: the column of the answer. None: the known one that is there.
            answers: what stands there: a `letter` (or the row's own label), an `index`, the `text` of the option, or
                `any` of these.
            first: the index of the first option.
            prompt: `base`, text for a base model; `chat`, messages for an instruct model; `rows`, the messages of the
                column `prompt` as they are; or a text of your own that holds `{question}` and `{options}`.
            system: a system message of `chat`.
            texts: whether a response may name an option by its text, as in `\boxed{Paris}`.
            right_boxed: what a right letter in `\boxed{}` earns.
            right_unboxed: what one earns that follows "answer is", without a box.
            wrong_boxed: what a box with anything else earns.
            wrong_unboxed: what a response earns that is wrong without a box, or has no answer.
        """

        question: str | None = None
        options: str | list[str] | None = None
        answer: str | None = None
        answers: Literal["any", "letter", "index", "text"] = "any"
        first: int = 0
        prompt: str = "base"
        system: str | None = None
        texts: bool = False
        right_boxed: float = 1.0
        right_unboxed: float = 0.5
        wrong_boxed: float = -0.5
        wrong_unboxed: float = -1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            known = (*_PROMPTS, _ROWS)
            if self.prompt not in known and "{question}" not in self.prompt:
                raise ValueError(f"prompt must be one of {', '.join(known)}, or hold {{question}}, got {self.prompt!r}")
            if self.system is not None and self.prompt != "chat":
                raise ValueError(f"system must be null where prompt is not chat, got {self.system!r}")
            if isinstance(self.options, list) and not 2 <= len(self.options) <= len(LETTERS):
                raise ValueError(f"options must be a column, or 2 to {len(LETTERS)} columns, got {self.options!r}")
            for name in ("right_boxed", "right_unboxed", "wrong_boxed", "wrong_unboxed"):
                if not math.isfinite(getattr(self, name)):
                    raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")

    settings: Settings

    def parse(self, row: dict[str, Any]) -> Instance | None:
        settings = self.settings
        question = question_of(pick(row, "question", settings.question, QUESTIONS))
        if own := options_of(row, settings.options):
            options, labels = own
            listed = list(listed_in(question).values()) == list(options.values())
            if not listed and settings.prompt not in (*_PROMPTS, _ROWS) and "{options}" not in settings.prompt:
                raise ValueError(f"prompt must hold {{options}}, which questions lack, got {settings.prompt!r}")
        elif options := listed_in(question):
            labels, listed = list(options), True
        else:
            return None
        value = pick(row, "answer", settings.answer, ANSWERS)
        try:
            answer = answer_of(value, options, labels, settings.answers, settings.first)
        except ValueError:
            if own:
                raise
            return None  # CrossThink-QA holds rows whose answer is none of the options in their text
        if answer is None:
            return None
        instance: Instance = {"question": question, "options": options, "listed": listed, "answer": answer}
        if settings.prompt == _ROWS:
            instance["messages"] = messages(row.get("prompt"))
        return instance

    def question(self, instance: Instance) -> str:
        return f"{instance['question']}\n{_lines(instance)}"

    def prompt(self, instance: Instance) -> Prompt:
        if self.settings.prompt == _ROWS:
            return instance["messages"]
        template = _PROMPTS.get(self.settings.prompt, self.settings.prompt)
        options = "" if instance["listed"] else _lines(instance)
        if not options:
            template = template.replace("\n{options}", "")
        values = {"{question}": instance["question"], "{options}": options}
        text = re.sub(r"\{(?:question|options)\}", lambda found: values[found[0]], template)
        if self.settings.prompt != "chat":
            return text
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        return [*system, {"role": "user", "content": text}]

    def correct(self, response: str, instance: Instance) -> bool:
        return self._judged(response, instance)[0] == instance["answer"]

    @property
    def rewards(self) -> Mapping[str, Reward]:
        r"""By name: `correctness`, 1.0 for the right letter, boxed or not; `crossthink`, the rule of CrossThink-QA;
        `format`, 1.0 for a response with a `\boxed{}`."""
        return {
            CORRECTNESS: one_by_one(self.correct),
            "crossthink": one_by_one(self._crossthink),
            "format": one_by_one(lambda response, _: spoken(response)[1]),
        }

    def _crossthink(self, response: str, instance: Instance) -> float:
        letter, has_box = self._judged(response, instance)
        if letter == instance["answer"]:
            return self.settings.right_boxed if has_box else self.settings.right_unboxed
        return self.settings.wrong_boxed if has_box else self.settings.wrong_unboxed

    def _judged(self, response: str, instance: Instance) -> tuple[str | None, bool]:
        """The option that a response chooses, and whether it has a box."""
        text, has_box = spoken(response)
        return chosen(text, instance["options"], self.settings.texts), has_box

    def label(self, instance: Instance) -> str:
        return shorten(instance["question"], 48, placeholder=" ...")

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        letter, has_box = self._judged(response, instance)
        return {"boxed": int(has_box), "answered": int(letter is not None)}

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        boxed, answered = totals.get("boxed", 0), totals.get("answered", 0)
        return {
            "boxed": Figure("responses with a boxed answer", boxed / max(1, responses), share=True),
            "answered": Figure("responses that choose an option", answered / max(1, responses), share=True),
            "answered_right": Figure("of these, right", right / max(1, answered), share=True),
        }

    def stand_in(self) -> MultipleChoice:
        """The same settings on a few questions of general knowledge, a file a split."""
        own = {"question": "question", "options": "options", "answer": "answer", "answers": "any", "train_size": None}
        return type(self)(replace(self.settings, **self.settings.files_in(_FIXTURE), **own))


def _lines(instance: Instance) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in instance["options"].items())
