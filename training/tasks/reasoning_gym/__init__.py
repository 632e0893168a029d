"""The sets of the package reasoning_gym, each by its name: questions that are drawn and judged by a program.

`zebra_puzzles` is the nearest to ZebraLogic, on which the paper trains Qwen3-4B: the same kind of puzzle (houses in a
row, a property of each kind in each, clues), but one question is asked, who lives in one house. ZebraLogic
(allenai/ZebraLogicBench) asks for the whole grid, or for one cell as multiple choice, over 2 to 6 houses and as many
properties; here `options: {num_people: 5, num_characteristics: 5}` sets both. `gsm_symbolic` asks word problems of the
kind of GSM8K, with names and numbers drawn anew, and needs no download.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...task import CORRECTNESS, Figure, Instance, Prompt, Reward, SplitName, Task, TaskSettings
from .questions import Question, Questions, ask, end_processes

_OPEN, _CLOSE = "<answer>", "</answer>"
MAX_ANSWER = 10_000  # characters; a longer answer is not scored. The longest that a set asks for has about 5,000
SECONDS = 5.0  # of a processor that scoring an answer may take; then it scores 0
_CHECKED = 20  # questions of train whose own answers must score 1
_JUDGES = max(1, min(4, (os.cpu_count() or 1) // 2))
_FORM = "Give the final answer, and nothing else, between <answer> and </answer>."


class ReasoningGym(Task):
    """Questions of a set of reasoning_gym.

    The answer of a response is the text of its last `<answer>...</answer>`, which is the package's convention. The
    set's own scorer judges it, in a process that is killed where it takes too long. Some scorers evaluate answers as
    Python; in that process they read literals and expressions only (`worker.py`).

    Of version 0.1.25 these are refused: `boxnet`, `graph_color`, `propositional_logic`, `rubiks_cube` and `rush_hour`,
    which have questions without an answer, and `intermediate_integration`, some of whose answers are integrals as they
    stood. `knight_swap` and `sokoban` take half a second to draw a question, `futoshiki` and `zebra_puzzles` a tenth;
    of all others 1,000 are drawn within a minute.

    Raises:
        ValueError: where the package or the set does not exist, the set does not take the options, or does not give its
            own answers the score 1: then no response could be right.
    """

    @dataclass
    class Settings(TaskSettings):
        """Which questions, and how they are asked.

        Attributes:
            dataset: the set's name in the package, as in zebra_puzzles.
            options: fields of the set's configuration there, except its seed and size.
            prompt: `base`, text for a base model; `chat`, messages for an instruct model; or a text of your own that
                holds `{question}`.
            seed: other questions for another one.
        """

        dataset: str = ""
        options: dict[str, Any] = field(default_factory=dict)
        prompt: str = "chat"
        seed: int = 0

        def __post_init__(self) -> None:
            if not self.dataset:
                raise ValueError(
                    "dataset must be the name of a set of reasoning_gym, got '': for example zebra_puzzles"
                )
            for key, instead in (("seed", "task.seed"), ("size", "task.train_size and eval.size")):
                if key in self.options:
                    raise ValueError(f"options must not hold {key}, got {self.options!r}: {instead} says it")
            try:
                json.dumps(self.options)
            except (TypeError, ValueError):
                raise ValueError(f"options must hold what JSON has, got {self.options!r}") from None
            if self.prompt not in _PROMPTS and "{question}" not in self.prompt:
                raise ValueError(
                    f"prompt must be {', '.join(_PROMPTS)}, or text that holds {{question}}, got {self.prompt!r}"
                )

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                f"name must be a task whose package is installed, got {settings.name!r}: "
                'pip install "rhythm-kernels[tasks]"'
            )
        dataset, options = settings.dataset, settings.options
        try:
            _check(dataset, options)
        except RuntimeError as error:  # no process starts
            raise ValueError(
                f"name must be a task whose package can be imported, got {settings.name!r}: {error}"
            ) from error
        self._questions = Questions(dataset, options, settings.seed)
        self._entries: dict[int, Question] = {}
        self._check_truth()

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        """The first `size` questions of a split, none of which is in another, or twice.

        Raises:
            ValueError: for a size of None, since sets have no end; and where a set repeats itself before `size`.
        """
        dataset = self.settings.dataset
        if size is None:
            name = "train_size" if split == "train" else "the size"
            raise ValueError(f"{name} must be a number, got None: the questions of {dataset} have no end")
        found = self._questions.first(split, size)
        if len(found) < size:
            raise ValueError(
                f"dataset must have at least {size} different questions for {split}, got {dataset} with {len(found)}: "
                "its options may allow more"
            )
        self._entries |= {question.number: question for question in found}
        return [{"number": one.number, "question": one.question, "answer": one.answer} for one in found]

    def prompt(self, instance: Instance) -> Prompt:
        if self.settings.prompt in _PROMPTS:
            return _PROMPTS[self.settings.prompt](instance["question"])
        return self.settings.prompt.replace("{question}", instance["question"])

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """By name: `correctness`, 1.0 for an answer whose score is 1; `score`, what the set gives, which for many sets
        is a part for what is near, or well-formed; `format`, 1.0 for a response that has an answer."""
        return {
            CORRECTNESS: lambda responses, instances: [float(one == 1.0) for one in self._scores(responses, instances)],
            "score": self._scores,
            "format": lambda responses, _: [float(bool(answer_of(response))) for response in responses],
        }

    def correct(self, response: str, instance: Instance) -> bool:
        return self._scores([response], [instance]) == [1.0]

    def label(self, instance: Instance) -> str:
        words = " ".join(instance["question"].split())
        return f"{instance['number']}: {words[:40]} ..."

    def describe(self) -> str:
        return f"{self.settings.dataset} of reasoning_gym"

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        return {"answered": int(bool(answer_of(response)))}

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        answered = totals.get("answered", 0)
        return {
            "answered": Figure("responses with an answer", answered / responses if responses else 0.0, share=True),
            "right_of_answered": Figure("right of those answered", right / answered if answered else 0.0, share=True),
        }

    def close(self) -> None:
        """End the processes that draw and score, which all tasks of this class share; they start again when needed."""
        end_processes()

    def _scores(self, responses: Sequence[str], instances: Sequence[Instance]) -> list[float]:
        scores = [0.0] * len(responses)
        asked = []
        for place, (response, instance) in enumerate(zip(responses, instances, strict=True)):
            answer = answer_of(response)
            if answer and len(answer) <= MAX_ANSWER:
                asked.append((place, answer, self._entry(instance)))
        requests = [(*self._questions.scored_as, answer, entry) for _, answer, entry in asked]
        for (place, *_), reply in zip(asked, ask("score", requests, _JUDGES, SECONDS) if asked else []):
            scores[place] = reply or 0.0
        return scores

    def _entry(self, instance: Instance) -> str:
        """What the scorer reads of a question. One that another process drew is drawn again."""
        number = instance["number"]
        if number not in self._entries and (again := self._questions.numbered(number)):
            self._entries[number] = again
        known = self._entries.get(number)
        if known is None or known.question != instance["question"]:
            raise ValueError(
                f"an instance must be a question of {self.settings.dataset} with the same options, seed and version of "
                f"reasoning_gym, got {instance['question'][:60]!r}"
            )
        return known.entry

    def _check_truth(self) -> None:
        sample = self._questions.first("train", _CHECKED)
        truths = [answer_of(f"{_OPEN}{one.answer}{_CLOSE}") or "" for one in sample]
        asked = [(*self._questions.scored_as, truth, one.entry) for truth, one in zip(truths, sample)]
        for one, request, score in zip(sample, asked, ask("score", asked, _JUDGES, SECONDS)):
            if score is None:  # by a process that had just started, and imported much
                (score,) = ask("score", [request], _JUDGES, SECONDS)
            if one.answer is None:
                what = f"which gives no answer to its question {one.number}"
            elif score is None:
                what = f"which takes over {SECONDS:g} seconds to score its own answer to question {one.number}"
            elif score != 1.0:
                what = f"which scores {score:g} for its own answer to question {one.number}"
            else:
                continue
            wanted = "a set that gives its own answers the score 1"
            raise ValueError(f"dataset must be {wanted}, got {self.settings.dataset!r}, {what}")


def answer_of(response: str) -> str | None:
    """The text of the last `<answer>...</answer>`, without white space around it; None if there is none."""
    close = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, close) if close >= 0 else -1
    if start < 0:
        return None
    start += len(_OPEN)
    # A stray second closing tag must not widen the answer: it ends at the first one after its opening
    return response[start : response.find(_CLOSE, start)].strip()


def _check(dataset: str, options: Mapping[str, Any]) -> None:
    (wrong,) = ask("check", [(dataset, options)])
    if wrong is None:
        raise ValueError(f"options must be what {dataset} can be made with, got {options!r}: it took too long")
    if known := wrong.get("known"):
        near = difflib.get_close_matches(dataset, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"dataset must be a set of reasoning_gym, got {dataset!r}: {hint}")
    if fields := wrong.get("fields"):
        raise ValueError(f"options must hold only {', '.join(fields)} for {dataset}, got {options!r}")
    if error := wrong.get("error"):
        raise ValueError(f"options must be what {dataset} takes, got {options!r}: {error}")


def _base(question: str) -> str:
    return (
        "What follows is a dialogue. A user asks a question; the assistant reasons first and then answers.\n"
        f"User: {question}\n{_FORM}\nAssistant: I will work through this one step at a time.\n"
    )


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{question}\n\n{_FORM}"}]


_PROMPTS = {"base": _base, "chat": _chat}
