r"""Maths problems from files, as published or your own, judged by math-verify.

A response is judged by its last `\boxed{...}` alone, as the graders of MATH and of verl judge it; math-verify then says
whether what it holds equals the right answer, `0.5` and `\frac{1}{2}` alike. With `boxed_only: false`, a response
without a box is judged by what follows its last `####`, as GSM8K marks answers, else by what math-verify finds in its
last 2,000 characters: what follows "final answer is" or "answer:", else the last formula or number. That is kinder to
base models, and pays for guesses: the last number of a response that was cut off may be right by chance.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from ...judges import Lost
from ...published import LONGEST, at, bare, boxed, messages, pick
from ...rows import FileSettings, FileTask
from ...task import CORRECTNESS, Figure, Instance, Prompt, Reward, one_by_one
from .answers import ANSWERS, QUESTIONS, gold, marked, plain
from .verdicts import Judge, Request, Verdict

_ASK = "Reason step by step, and put the final answer within \\boxed{}."
_PROMPTS = {"base": f"Problem: {{question}}\n{_ASK}\nSolution:", "chat": f"{{question}}\n{_ASK}"}
_ROWS = "rows"
_FIXTURE = Path(__file__).with_name("fixture")


class Maths(FileTask):
    """Problems with one answer, such as those of GSM8K, MATH, DAPO-Math-17k, AIME, AMC, Minerva and OlympiadBench."""

    @dataclass
    class Settings(FileSettings):
        r"""Which problems, how they are asked, and how they are judged.

        Attributes:
            question: the column of the question; dotted to reach into mappings. None: the known one that is there.
            answer: the column of the answer, as `reward_model.ground_truth`. None: the known one that is there.
            prompt: `base`, text for a base model; `chat`, messages for an instruct model; `rows`, the messages of the
                column `prompt` as they are; or a text of your own that holds `{question}`.
            system: a system message of `chat`.
            boxed_only: whether a response without a `\boxed{...}` is wrong.
            timeout: seconds of a processor to judge a response; one that takes longer is wrong.
            workers: processes that judge.
        """

        question: str | None = None
        answer: str | None = None
        prompt: str = "base"
        system: str | None = None
        boxed_only: bool = True
        timeout: float = 5.0
        workers: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.prompt not in (*_PROMPTS, _ROWS):
                if "{question}" not in self.prompt:
                    known = ", ".join((*_PROMPTS, _ROWS))
                    raise ValueError(f"prompt must be one of {known}, or hold {{question}}, got {self.prompt!r}")
                if self.boxed_only and "boxed" not in self.prompt:
                    raise ValueError(f"prompt must ask for \\boxed{{}} unless boxed_only is false, got {self.prompt!r}")
            if self.system is not None and self.prompt != "chat":
                raise ValueError(f"system must be null where prompt is not chat, got {self.system!r}")
            if self.timeout <= 0:
                raise ValueError(f"timeout must be above 0, got {self.timeout!r}")
            if not 1 <= self.workers <= 256:
                raise ValueError(f"workers must be at least 1 and at most 256, got {self.workers!r}")

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError('name must be a task whose packages are there, got "maths": pip install math-verify')
        super().__init__(settings)
        self._judge = Judge(settings.workers, settings.timeout)

    def parse(self, row: dict[str, Any]) -> Instance | None:
        asked = at(row, "extra_info.question") if isinstance(row.get("prompt"), list) else None
        if self.settings.question is not None or not isinstance(asked, str):
            asked = pick(row, "question", self.settings.question, QUESTIONS, _question)
        instance = {"question": _question(asked), "answer": self._answer(row)}
        if not instance["answer"]:
            return None
        if self.settings.prompt == _ROWS:
            instance["messages"] = messages(row.get("prompt"))
            if self.settings.boxed_only and "boxed" not in str(instance["messages"]):
                said = instance["messages"][-1]["content"][-80:]
                raise ValueError(f"prompt must ask for \\boxed{{}} unless boxed_only is false, got {said!r}")
        return instance

    def _answer(self, row: dict[str, Any]) -> list[str]:
        for known in ANSWERS[:-1]:
            if self.settings.answer is None and not any(at(row, name) is not None for name in known):
                continue
            value = pick(row, "answer", self.settings.answer, known, gold)
            break
        else:
            value = pick(row, "answer", self.settings.answer, [name for known in ANSWERS for name in known], gold)
        try:
            return [] if value is None else gold(value)
        except ValueError as error:
            raise ValueError(f"answer {error}") from None

    def question(self, instance: Instance) -> str:
        return instance["question"]

    def prompt(self, instance: Instance) -> Prompt:
        wanted = self.settings.prompt
        if wanted == _ROWS:
            return instance["messages"]
        text = _PROMPTS.get(wanted, wanted).replace("{question}", instance["question"])
        if wanted != "chat":
            return text
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system is not None else []
        return [*system, {"role": "user", "content": text}]

    def correct(self, response: str, instance: Instance) -> bool:
        return self._verdicts([response], [instance]) == [True]

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {CORRECTNESS: self._correctness, "format": one_by_one(lambda text, _: boxed(text) is not None)}

    def _correctness(self, responses: Sequence[str], instances: Sequence[Instance]) -> list[float]:
        return [float(verdict is True) for verdict in self._verdicts(responses, instances)]

    def _verdicts(self, responses: Sequence[str], instances: Sequence[Instance]) -> list[Verdict]:
        return self._judge.verdicts([self._request(*case) for case in zip(responses, instances, strict=True)])

    def _request(self, response: str, instance: Instance) -> Request:
        """What is judged of a response: its last box, or the end of its text, where the answer stands."""
        right = tuple(instance["answer"])
        answer = boxed(response)
        if answer is None and not self.settings.boxed_only:
            answer = marked(response)
            if answer is None:
                return Request(right, response[-LONGEST:], False)
        return Request(right, plain(answer or ""), True)

    def label(self, instance: Instance) -> str:
        return shorten(instance["question"], 48, placeholder=" ...")

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        has_box, verdict = boxed(response) is not None, self._verdicts([response], [instance])[0]
        return {
            "boxed": int(has_box),
            "boxed_right": int(has_box and verdict is True),
            "not_judged": int(isinstance(verdict, Lost)),
        }

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        return {
            "boxed": Figure("responses with a boxed answer", totals["boxed"] / max(1, responses), share=True),
            "boxed_right": Figure("of these, right", totals["boxed_right"] / max(1, totals["boxed"]), share=True),
            "not_judged": Figure(
                "responses that could not be judged in time", totals["not_judged"] / max(1, responses), share=True
            ),
        }

    def stand_in(self) -> Maths:
        """The same settings on a few problems of grade school, a file a split."""
        return type(self)(
            replace(self.settings, **self.settings.files_in(_FIXTURE), question=None, answer=None, train_size=None)
        )

    def close(self) -> None:
        self._judge.pool.close()


def _question(value: Any) -> str:
    if not isinstance(value, str | list):
        raise ValueError(f"question must be text or chat messages, got {value!r}")
    text = value if isinstance(value, str) else messages(value)[-1]["content"]
    if not (text := bare(text)):
        raise ValueError("question must be text, got nothing")
    return text
