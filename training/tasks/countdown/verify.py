"""The Countdown verifier: reads the answer out of a completion and judges it, exactly and in bounded time.

The input is whatever a model wrote, so it is treated as hostile. There is no `eval`: a tokenizer that knows digits, six
symbols and spaces feeds a parser of two stacks (no recursion), values are rational, and an expression longer than
`MAX_EXPRESSION` characters is not read at all. This bound, not a timer, keeps a million brackets or `9**9**9` down to
microseconds.
"""

import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

MAX_EXPRESSION = 256  # characters; the longest natural four-number answer has about 40
MAX_DIGITS = 9  # of one integer: larger ones cannot be among the given numbers and only cost time

_OPEN, _CLOSE, _WORD = "<answer>", "</answer>", "answer"
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+)|([-+*/()]))", re.ASCII)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def extract_answer(completion: str) -> str | None:
    """The text of the last complete `<answer>...</answer>`, else what follows the last word `answer`.

    The second form is the tiny model's (`answer ( 11 - 7 ) + 2`); there a colon after the word is skipped and
    case does not matter. None if there is neither, or if the text is too long to be an expression.
    """
    last_close = completion.rfind(_CLOSE)
    start = completion.rfind(_OPEN, 0, last_close) if last_close >= 0 else -1
    if start >= 0:
        start += len(_OPEN)
        # A stray second closing tag must not widen the block: it ends at the first one after its opening.
        end = completion.find(_CLOSE, start)
        return completion[start:end].strip() if end - start <= MAX_EXPRESSION else None
    # An expression is short, so the word that introduces one can only stand near the end: the rest is not
    # searched.
    tail = completion[-4 * MAX_EXPRESSION :].rstrip()[-(MAX_EXPRESSION + len(_WORD) + 1) :]
    words = list(re.finditer(r"\banswer\b:?", tail, re.ASCII | re.IGNORECASE))
    return tail[words[-1].end() :].strip() if words else None


def _tokenize(text: str) -> list[str] | None:
    """The tokens of an expression; None where a character or an integer is not allowed."""
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        literal = match[1]
        if literal is not None and (len(literal) > MAX_DIGITS or (literal[0] == "0" and literal != "0")):
            return None
        tokens.append(literal or match[2])
        position = match.end()
    return tokens


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression and its integer literals, in order.

    Grammar: non-negative decimal integers, `+ - * /`, parentheses, and one unary minus directly before an
    integer (which counts as using that integer). Everything else is None: other characters, `**`, `//`,
    `1.5`, leading zeros, a trailing `= 24` (that is an equation, not an expression), division by zero, more
    than `MAX_EXPRESSION` characters.
    """
    text = text.strip()
    if not text or len(text) > MAX_EXPRESSION:
        return None
    tokens = _tokenize(text)
    if tokens is None:
        return None

    values: list[Fraction] = []
    pending: list[str] = []  # operators and opening brackets not yet applied
    literals: list[int] = []

    def reduce_top() -> bool:
        right, left, symbol = values.pop(), values.pop(), pending.pop()
        if symbol == "/" and right == 0:
            return False
        values.append(_APPLY[symbol](left, right))
        return True

    operand_next, sign = True, 1
    for index, token in enumerate(tokens):
        if operand_next:
            if token.isdigit():
                literals.append(int(token))
                values.append(Fraction(sign * int(token)))
                operand_next, sign = False, 1
            elif token == "(":
                pending.append(token)
            elif token == "-" and index + 1 < len(tokens) and sign == 1 and tokens[index + 1].isdigit():
                sign = -1
            else:
                return None
        elif token == ")":
            while pending and pending[-1] != "(":
                if not reduce_top():
                    return None
            if not pending:
                return None
            pending.pop()
        elif token in _PRECEDENCE:
            while pending and pending[-1] != "(" and _PRECEDENCE[pending[-1]] >= _PRECEDENCE[token]:
                if not reduce_top():
                    return None
            pending.append(token)
            operand_next = True
        else:
            return None
    if operand_next or "(" in pending:
        return None
    while pending:
        if not reduce_top():
            return None
    return values[0], literals


def answer_value(completion: Any, numbers: Any) -> Fraction | None:
    """The value of a well-formed answer: one that parses and uses exactly the given numbers.

    Never raises: a completion that is no text, or numbers that are no integers, give None.
    """
    if not isinstance(completion, str):
        return None
    try:
        if len(numbers) > MAX_EXPRESSION:
            return None
        given = sorted(operator.index(number) for number in numbers)
    except (TypeError, ValueError):
        return None
    text = extract_answer(completion)
    parsed = parse_expression(text) if text else None
    if parsed is None or sorted(parsed[1]) != given:
        return None
    return parsed[0]


def score(completion: str, numbers: Sequence[int], target: int) -> float:
    """The reward of one completion, at TinyZero's levels, except that wrong numbers earn nothing here.

    Args:
        completion: the model's text, without its prompt.
        numbers: the given integers; the answer must use each of them exactly once.
        target: the value to reach.

    Returns:
        1.0 if the answer's exact rational value is the target, 0.1 if it parses and uses exactly the numbers but has
        another value, else 0.0. Pure; never raises; bounded time.
    """
    value = answer_value(completion, numbers)
    if value is None:
        return 0.0
    try:
        return 1.0 if value == operator.index(target) else 0.1
    except TypeError:
        return 0.0
