"""Search traces, the tiny model's thoughts as text: written for the warm start, and counted in what a model wrote.

A trace tries paths. A path joins two numbers at a time until one is left; the last equation carries a verdict
on its value: `lo`, `hi` or `ok` against the target (which says more than right or wrong).
Then either another last step is tried from the same two numbers, or a new path starts:

    7 - 2 = 5 , 5 + 11 = 16 hi 5 * 11 = 55 hi 11 - 7 = 4 , 4 + 2 = 6 ok answer ( 11 - 7 ) + 2

An equation that ends in a comma is a step, one that ends in a verdict is a last step. A search that gives up
ends in `answer none`. All words are separated by one space and are one token each, so lengths below are
tokens.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .solver import integer_steps, reachable
from .verify import answer_value

LIMIT = 98  # the largest integer of the vocabulary, hence of any intermediate
MAX_TOKENS = 116  # of a trace: also the most persistent search ends in an answer before this

Item = tuple[int, str]  # a value and the expression that made it


@dataclass(frozen=True)
class Style:
    """How well one trace searches.

    Warm-start data mixes styles, so that reinforcement can move mass from the bad ones to the good ones.

    Args:
        aim: probability that a last step is the one closest to the target, and not a random one.
        insight: probability that an earlier step is one from which the target can still be reached.
        budget: tokens after which the search gives up (`MAX_TOKENS` at most).
    """

    aim: float
    insight: float
    budget: int


def draw_style(rng: random.Random) -> Style:
    """A random style: aimed or aimless, patient or not."""
    aimed = rng.random() < 0.3
    return Style(
        aim=rng.uniform(0.75, 1.0) if aimed else rng.uniform(0.0, 0.4),
        insight=rng.uniform(0.1, 0.5) if aimed else 0.05,
        budget=MAX_TOKENS if rng.random() < 0.7 else rng.randint(40, MAX_TOKENS),
    )


def _wrap(expression: str) -> str:
    return f"( {expression} )" if " " in expression else expression


def _steps(state: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Every step from a state: the equation, and the state after it (its new value last)."""
    found = []
    for i in range(len(state)):
        for j in range(i + 1, len(state)):
            rest = [item for k, item in enumerate(state) if k not in (i, j)]
            (a, left), (b, right) = state[i], state[j]
            for x, symbol, y, value in integer_steps(a, b, LIMIT):
                # integer_steps may turn a pair round (larger first); the expressions follow the values.
                first, second = (left, right) if x == a else (right, left)
                expression = f"{_wrap(first)} {symbol} {_wrap(second)}"
                found.append((f"{x} {symbol} {y} = {value}", [*rest, (value, expression)]))
    return found


def _path(numbers: Sequence[int], target: int, style: Style, rng: random.Random) -> tuple[list[str], list[Item]] | None:
    """Steps down to two values: their equations and the two values. None at a dead end."""
    state: list[Item] = [(number, str(number)) for number in numbers]
    equations = []
    while len(state) > 2:
        steps = _steps(state)
        if rng.random() < style.insight:
            hopeful = [s for s in steps if target in reachable([v for v, _ in s[1]], LIMIT)]
            steps = hopeful or steps
        if not steps:
            return None
        equation, state = rng.choice(steps)
        equations.append(equation)
    return equations, state


def write_trace(numbers: Sequence[int], target: int, style: Style, rng: random.Random) -> str:
    """A search of the given style: at most `MAX_TOKENS` words, ended by an answer or by `none`."""
    words: list[str] = []
    answer_length = 4 * len(numbers)  # its numbers, operators, brackets, `answer` and the end token
    path_length = 6 * (len(numbers) - 1)
    tried: set[tuple[int, ...]] = set()
    while len(words) + path_length + answer_length <= style.budget:
        for _ in range(8):  # a few draws for a pair of values that was not tried yet
            path = _path(numbers, target, style, rng)
            if path is not None and tuple(sorted(value for value, _ in path[1])) not in tried:
                break
        else:
            break
        equations, pair = path
        tried.add(tuple(sorted(value for value, _ in pair)))
        for equation in equations:
            words += [*equation.split(), ","]
        leaves = _steps(pair)
        rng.shuffle(leaves)
        if rng.random() < style.aim:
            leaves = [min(leaves, key=lambda leaf: abs(leaf[1][-1][0] - target))]
        for equation, (result,) in leaves:
            words += equation.split()
            value, expression = result
            if value == target:
                return " ".join([*words, "ok", "answer", expression])
            words.append("lo" if value < target else "hi")
            if rng.random() < 0.65 or len(words) + 6 + answer_length > style.budget:
                break
    return " ".join([*words, "answer", "none"])


_EQUATION = re.compile(r"(?<!\S)(\d{1,3}) ([-+*/]) (\d{1,3}) = (\d{1,3})(?: (lo|hi|ok))?(?!\S)")
_COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass(frozen=True)
class TraceReport:
    """What a response is made of. Counts, so that reports of many responses can be added up."""

    equations: int  # equations written
    right_arithmetic: int  # of them, those whose value is right
    verdicts: int  # equations with a verdict: the number of complete attempts
    right_verdicts: int  # of them, those whose verdict fits the written value
    answered: bool  # ends in a well-formed expression or in an explicit `none`
    gave_up: bool  # ends in `answer none`
    correct: bool  # the verifier's judgement


def _holds(a: int, symbol: str, b: int, value: int) -> bool:
    if symbol == "/":
        return b != 0 and a == b * value
    return _COMPUTE[symbol](a, b) == value


def analyse(completion: str, numbers: Sequence[int], target: int) -> TraceReport:
    """Count what a tiny-model response did: how much it searched, how well it calculated, how it ended.

    A response counts as answered if it ends in an expression that uses exactly the numbers, right or wrong,
    or gives up explicitly; a cut-off search, a cut-off expression and an expression over other numbers do not
    count.
    """
    text = completion.strip()
    equations = right = verdicts = right_verdicts = 0
    for a, symbol, b, value, verdict in _EQUATION.findall(text):
        equations += 1
        right += _holds(int(a), symbol, int(b), int(value))
        if verdict:
            verdicts += 1
            truth = "ok" if int(value) == target else "lo" if int(value) < target else "hi"
            right_verdicts += verdict == truth
    gave_up = text.endswith("answer none")
    value = answer_value(text, numbers)
    return TraceReport(
        equations=equations,
        right_arithmetic=right,
        verdicts=verdicts,
        right_verdicts=right_verdicts,
        answered=gave_up or value is not None,
        gave_up=gave_up,
        correct=value is not None and value == target,
    )
